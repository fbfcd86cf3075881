"""One optimiser step over the global batch: gradients, all-reduce of the losses, clipping, update.

Losses and norms stay on the device: a step does not wait for it.

Every loss is a partial sum of a mean over the global batch (`Task.losses`), so the result depends neither on the number
of ranks nor on that of micro-batches. DDP averages gradients over ranks, hence the factor `num_processes`.
"""

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.training.optim import build_optimizers
from ssmttm.training.parallel.sharding import Sharding, local_part, part_of, whole
from ssmttm.training.tasks.base import Batch, Losses, Task


class TrainedModule:
    """A module on its device, its optimisers by kind and, after `wrap`, the wrapped module that the loop calls."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: DictConfig,
        accelerator: Accelerator,
        sharding: Sharding | None = None,
    ) -> None:
        self.module = module.to(accelerator.device)
        if sharding is not None:
            sharding.shard(self.module)
        self.optimizers = build_optimizers(self.module, config, name)
        self.wrapped = self.module
        self._accelerator, self._sharding = accelerator, sharding

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a whole state dict into the module. Raises UserError if names or shapes are not those of the module."""
        own = self.module.state_dict()
        if own.keys() != weights.keys():
            different = sorted(own.keys() ^ weights.keys())
            raise UserError(f"the checkpoint is of another model: one of the two lacks {', '.join(different[:3])}")
        for name, tensor in own.items():
            value = weights[name]
            if value.shape != tensor.shape:
                shapes = f"{tuple(value.shape)}, {tuple(tensor.shape)} is expected"
                raise UserError(f"the checkpoint is of another model: {name} is {shapes}")
            local_part(tensor).copy_(part_of(value, tensor))

    def wrap(self) -> None:
        """Add autocast and, unless the module is sharded, DDP. Nothing if it has nothing to train. Call it after
        loading the weights."""
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            is_sharded = self._sharding is not None
            self.wrapped = self._accelerator.prepare_model(self.module, evaluation_mode=is_sharded)

    def without_exchange(self) -> AbstractContextManager[None]:
        """For all micro-batches of a step but the last: their gradients stay on this rank, to be exchanged once. Those
        of sharded modules are exchanged each time, since a rank has no room for all."""
        return self._accelerator.no_sync(self.wrapped) if self._sharding is None else contextlib.nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        """Every rank holds all weights, so that one of them can use the module alone. All must enter and leave."""
        return contextlib.nullcontext() if self._sharding is None else self._sharding.gathered(self.module)

    @property
    def has_gradients(self) -> bool:
        """Whether this step updates the module."""
        return any(parameter.grad is not None for parameter in self.module.parameters())

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate

    def update(self, skip: Tensor) -> None:
        """Step the optimisers if there are gradients; where `skip`, a scalar on the device, is 1, nothing changes."""
        if self.has_gradients:
            for optimizer in self.optimizers.values():
                optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch's GradScaler does
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def reset_moments(self, rows: Mapping[str, Tensor]) -> None:
        """Zero the optimiser's moments in the rows that have a new meaning: a mask by parameter name."""
        parameters = dict(self.module.named_parameters())
        for name, mask in rows.items():
            for optimizer in self.optimizers.values():
                for moment in optimizer.state.get(parameters[name], {}).values():
                    if moment.shape == parameters[name].shape:  # not the count of steps
                        moment[mask] = 0


def gradients(
    task: Task, trained_modules: dict[str, TrainedModule], micro: list[Batch], step: int, accelerator: Accelerator
) -> tuple[Losses, tuple[float, float, float]]:
    """Forward and backward over this rank's micro-batches: partial losses; codes, seconds of audio and FLOPs."""
    denominators = global_denominators(task, micro, accelerator)
    wrapped = {name: module.wrapped for name, module in trained_modules.items()}
    totals: Losses = {}
    tokens = seconds = flops = 0.0
    for index, batch in enumerate(micro):
        batch_tokens, batch_seconds, forward_flops = task.throughput(batch, step)
        tokens, seconds, flops = tokens + batch_tokens, seconds + batch_seconds, flops + 3 * forward_flops
        with contextlib.ExitStack() as stack:
            if index < len(micro) - 1:  # ranks exchange gradients once per step
                for module in trained_modules.values():
                    stack.enter_context(module.without_exchange())
            losses_by_module = task.losses(wrapped, to_device(batch, accelerator.device), denominators, step)
            for name, losses in losses_by_module.items():
                total = total_loss(losses, task.loss_weights)
                (total * accelerator.num_processes).backward()
                accumulate(totals, {"loss" if name == "model" else f"{name}_loss": total, **losses})
    return totals, (tokens, seconds, flops)


def total_loss(losses: Losses, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the losses that have a weight."""
    return reduce(torch.add, [weights[name] * loss for name, loss in losses.items() if name in weights])


def accumulate(totals: Losses, losses: Losses) -> None:
    """Add the partial losses of a micro-batch to the totals, in float32, without gradient."""
    for name, loss in losses.items():
        value = loss.detach().float()
        totals[name] = totals[name] + value if name in totals else value


def global_denominators(task: Task, micro: list[Batch], accelerator: Accelerator) -> Tensor:
    """`Task.loss_denominators` summed over all micro-batches and ranks, [n]."""
    denominators = torch.stack([task.loss_denominators(batch) for batch in micro]).sum(0).to(accelerator.device)
    return accelerator.reduce(denominators, "sum")


def all_reduce_losses(losses: Losses, accelerator: Accelerator) -> Losses:
    """The losses summed over all ranks, in one all-reduce."""
    sums = accelerator.reduce(torch.stack(list(losses.values())), "sum")
    return dict(zip(losses, sums.unbind(), strict=True))


def clip_gradients(trained_modules: dict[str, TrainedModule], clip: float | None) -> Losses:
    """Clip the gradient norm of each module to `clip` (None: only measure it); returns the norms before clipping."""
    norms = {}
    for name, module in trained_modules.items():
        if module.has_gradients:
            norm = nn.utils.clip_grad_norm_(module.module.parameters(), clip or math.inf)
            norms["grad_norm" if name == "model" else f"{name}_grad_norm"] = whole(norm)
    return norms


def to_numbers(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Values as numbers of the host. Waits for the device, once."""
    tensors = {name: value.float() for name, value in values.items() if isinstance(value, Tensor)}
    numbers = torch.stack(list(tensors.values())).tolist() if tensors else []
    return {**values, **dict(zip(tensors, numbers, strict=True))}


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """This rank's batch in slices of at most `size` items."""
    items = len(batch["ids"])
    size = size or items
    return [
        {key: _rows(value, slice(start, start + size)) for key, value in batch.items()}
        for start in range(0, items, size)
    ]


def _rows(value: Any, rows: slice) -> Any:
    if hasattr(value, "select_rows"):
        return value.select_rows(rows)
    return type(value)(*(field[rows] for field in value)) if isinstance(value, tuple) else value[rows]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
