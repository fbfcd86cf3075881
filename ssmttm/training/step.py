"""One optimiser step over the global batch: gradients, agreement of the ranks, clipping, a check before the update.

Every loss is a share of a mean over the global batch (`Task.losses`), so neither the number of ranks nor that of
micro-batches changes what is computed. DDP averages gradients over ranks, hence the factor of their number.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.training.optim import build_optimizer
from ssmttm.training.tasks.base import Batch, Losses, Task


class TrainedModule:
    """One trained module: itself on its device, its optimiser, and, after `wrap`, the form that the loop calls."""

    def __init__(self, module: nn.Module, config: DictConfig, accelerator: Accelerator) -> None:
        self.module = module.to(accelerator.device)
        self.optimizer = build_optimizer(self.module, config)
        self.wrapped = self.module
        self._accelerator = accelerator

    def wrap(self) -> None:
        """Autocast and DDP around the module, unless it has nothing to train; call it once the weights are loaded."""
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            self.wrapped = self._accelerator.prepare_model(self.module)

    @property
    def has_gradients(self) -> bool:
        """Whether it took a turn in this step."""
        return any(parameter.grad is not None for parameter in self.module.parameters())

    def update(self) -> None:
        """Step the optimiser if there is anything to step on."""
        if self.has_gradients:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def gradients(
    task: Task, trained_modules: dict[str, TrainedModule], micro: list[Batch], step: int, accelerator: Accelerator
) -> tuple[Losses, tuple[float, float, float]]:
    """Forward and backward over a rank's micro-batches.

    Returns:
        This rank's share of each loss, and its codes, seconds of audio and FLOPs, forward and backward.
    """
    counts = global_denominators(task, micro, accelerator)
    wrapped = {name: module_name.wrapped for name, module_name in trained_modules.items()}
    totals: Losses = {}
    tokens = seconds = flops = 0.0
    for index, batch in enumerate(micro):
        metrics = task.work(batch, step)
        tokens, seconds, flops = tokens + metrics[0], seconds + metrics[1], flops + 3 * metrics[2]
        with contextlib.ExitStack() as stack:
            if index < len(micro) - 1:  # ranks exchange gradients once a step
                for module in wrapped.values():
                    stack.enter_context(accelerator.no_sync(module))
            by_player = task.losses(wrapped, to_device(batch, accelerator.device), counts, step)
            for name, losses in by_player.items():
                total = objective(losses, task.loss_weights)
                (total * accelerator.num_processes).backward()
                add(totals, {"loss" if name == "model" else f"{name}_loss": total, **losses})
    return totals, (tokens, seconds, flops)


def objective(losses: Losses, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the losses that have a weight."""
    return sum(weights[name] * loss for name, loss in losses.items() if name in weights)


def add(totals: Losses, shares: Losses) -> None:
    """Add the shares of a micro-batch to the totals, in float32, without gradient."""
    for name, share in shares.items():
        totals[name] = totals.get(name, 0.0) + share.detach().float()


def global_denominators(task: Task, micro: list[Batch], accelerator: Accelerator) -> Tensor:
    """`Task.counts` over all micro-batches and ranks, [n]."""
    counts = torch.stack([task.counts(batch) for batch in micro]).sum(0).to(accelerator.device)
    return accelerator.reduce(counts, "sum")


def all_reduce_metrics(
    shares: Losses, accelerator: Accelerator, flags: tuple[bool, ...] = ()
) -> tuple[dict[str, float], list[bool]]:
    """Losses of the global batch, and whether any rank raised each flag; the same on every rank, in one exchange."""
    raised = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    sums = accelerator.reduce(torch.cat([torch.stack(list(shares.values())), raised]), "sum").tolist()
    return dict(zip(shares, sums, strict=False)), [total > 0 for total in sums[len(shares) :]]


def clip_gradients(trained_modules: dict[str, TrainedModule], clip: float | None) -> dict[str, float]:
    """Clip each player's gradient to the norm `clip` (null: only measure); the norms before it, by name to log."""
    norms = {}
    for name, module_name in trained_modules.items():
        if module_name.has_gradients:
            norm = nn.utils.clip_grad_norm_(module_name.module.parameters(), clip or math.inf)
            norms["grad_norm" if name == "model" else f"{name}_grad_norm"] = float(norm)
    return norms


def check_finite(step: int, values: dict[str, float]) -> None:
    """Stop before the weights take in a loss or gradient that is no number.

    Raises:
        UserError: a value is NaN or infinite.
    """
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"step {step}: {', '.join(broken)} is not a finite number; stopped before the weights changed, the last "
            f"checkpoint is good: lower optim.lr or optim.clip and start from it in another run_dir"
        )


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """A rank's share of the global batch in slices of at most `size` items."""
    items = len(batch["ids"])
    size = size or items
    return [
        {key: _rows(value, slice(start, start + size)) for key, value in batch.items()}
        for start in range(0, items, size)
    ]


def _rows(value: Any, rows: slice) -> Any:
    return type(value)(*(field[rows] for field in value)) if isinstance(value, tuple) else value[rows]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
