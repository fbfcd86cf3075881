"""AdamW with weight decay on matrices only, and the learning rates as a function of the global step."""

import math
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW


def build_optimizer(module: nn.Module, config: DictConfig) -> AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters.

    No weight decay on parameters of at most one dimension (norms, biases, A_log, D, dt_bias), on those marked
    `_no_weight_decay` and, unless `decay_embeddings`, on embeddings.
    """
    embeddings = set()
    if not config.decay_embeddings:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    not_decayed: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        marked = getattr(parameter, "_no_weight_decay", False)
        exempt = parameter.ndim <= 1 or marked or id(parameter) in embeddings
        (not_decayed if exempt else decayed).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or groups[:1]  # a module may have no parameters
    return AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def learning_rate(step: int, length: int, config: DictConfig, module_name: str = "model") -> float:
    """The learning rate of a module: linear warm-up to its peak, then cosine decay until step `length`.

    `config.lr` is the peak of the model, `config.module_lr` has those of the other modules. All end at the same
    fraction of their peaks, min_lr / lr. `step` 0 is the first.
    """
    peak = config.lr if module_name == "model" else config.module_lr[module_name]
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    lowest = config.min_lr / config.lr if config.lr else 0.0
    progress = (step - config.warmup_steps) / max(1, length - config.warmup_steps)
    return peak * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
