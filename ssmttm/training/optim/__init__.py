"""Optimisers: AdamW, and Muon for the matrices of a model with AdamW for the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim._muon import muon

from ssmttm.errors import UserError
from ssmttm.mixers import Mixer
from ssmttm.training.parallel.sharding import local_part, part_of, whole

Named = list[tuple[str, nn.Parameter]]
OUTPUT_LAYERS = ("heads", "output")  # of TokenLM and LatentDenoiser; their matrices are AdamW's, as embeddings


def build_optimizers(module: nn.Module, config: DictConfig, name: str = "model") -> dict[str, Optimizer]:
    """The optimisers of a module's trainable parameters, by kind: adamw, and muon for a model with optim=muon.

    Args:
        config: `AdamWConfig` or `MuonConfig`.
        name: of the module; those beside the model have AdamW only.

    Raises:
        UserError: unknown `config.kind`.
    """
    if config.kind not in ("adamw", "muon"):
        raise UserError(f"unknown optim.kind={config.kind}: choose optim=adamw or optim=muon")
    parameters = [(key, parameter) for key, parameter in module.named_parameters() if parameter.requires_grad]
    matrices: Named = _hidden_matrices(module, parameters) if config.kind == "muon" and name == "model" else []
    chosen = {key for key, _ in matrices}
    rest = [(key, parameter) for key, parameter in parameters if key not in chosen]
    optimizers: dict[str, Optimizer] = {"adamw": _build_adamw(module, rest, config)}
    if matrices:
        optimizers["muon"] = BlockMuon(
            matrices, fused_rows(module), lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            ns_steps=config.newton_schulz_steps, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
    return optimizers


class BlockMuon(torch.optim.Muon):
    """Muon that makes the update of each block of rows of a fused projection orthogonal by itself.

    The update needs a whole matrix: sharded ones are gathered, one after the other, and every rank computes all of it.

    Args:
        params: matrices with their names.
        rows: the heights of the blocks by parameter; a parameter without an entry is one block.
        options: of `torch.optim.Muon`.
    """

    def __init__(self, params: Named, rows: dict[nn.Parameter, Sequence[int]], **options: Any) -> None:
        super().__init__(params, **options)
        self._rows = rows

    found_inf: Tensor | None = None  # a scalar on the device; 1: `step` changes nothing, as in torch's fused AdamW

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; does not wait for the device. If the parameters are sharded, all ranks must call it."""
        skip = self.found_inf
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return None
            skip = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, skip)
        return None

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any], skip: Tensor | None) -> None:
        """Update one matrix, block by block: in place, or in a copy if it is sharded or may have to stay as it is."""
        assert parameter.grad is not None
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        grad, weights, moments = whole(parameter.grad), whole(parameter), whole(momentum)
        if skip is not None and weights is parameter:
            weights, moments = weights.clone(), moments.clone()
        rows = list(self._rows.get(parameter, [len(parameter)]))
        options = {key: value for key, value in group.items() if key in self.defaults}
        blocks = (list(tensor.split(rows)) for tensor in (weights, grad, moments))
        muon(*blocks, **options, has_complex=False)
        if weights is parameter:
            return
        for tensor, updated in ((parameter, weights), (momentum, moments)):
            local, new = local_part(tensor), part_of(updated, tensor)
            local.copy_(new if skip is None else torch.where(skip.bool(), local, new))


def fused_rows(module: nn.Module) -> dict[nn.Parameter, Sequence[int]]:
    """The heights of the row blocks of each fused projection, by its weight: a Mamba-2 `in_proj` is z, x, B, C, dt."""
    mixers = [mixer for mixer in module.modules() if isinstance(mixer, Mixer)]
    return {mixer.get_parameter(name): rows for mixer in mixers for name, rows in mixer.fused_rows().items()}


def _hidden_matrices(module: nn.Module, parameters: Named) -> Named:
    """The weights of linear layers but those of the output and those without weight decay."""
    weights = {f"{name}.weight" for name, layer in module.named_modules()
               if isinstance(layer, nn.Linear) and name not in OUTPUT_LAYERS}  # fmt: skip
    return [(key, p) for key, p in parameters if key in weights and not getattr(p, "_no_weight_decay", False)]


def _build_adamw(module: nn.Module, parameters: Named, config: DictConfig) -> AdamW:
    """AdamW (arXiv 1711.05101).

    No weight decay on parameters of at most one dimension (norms, biases, A_log, D, dt_bias), on those marked
    `_no_weight_decay` and, unless `decay_embeddings`, on embeddings.
    """
    embeddings = set()
    if not config.decay_embeddings:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: Named = []
    not_decayed: Named = []
    for name, parameter in parameters:
        marked = getattr(parameter, "_no_weight_decay", False)
        exempt = parameter.ndim <= 1 or marked or id(parameter) in embeddings
        (not_decayed if exempt else decayed).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or groups[:1]  # a module may have no parameters
    return AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)
