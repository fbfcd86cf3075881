"""Validation with the averaged weights."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from ssmttm.training import rng
from ssmttm.training.ema import EMA
from ssmttm.training.parallel.sharding import reshard
from ssmttm.training.step import (
    TrainedModule,
    accumulate,
    all_reduce_losses,
    global_denominators,
    micro_batches,
    to_device,
    to_numbers,
    total_loss,
)
from ssmttm.training.tasks.base import Batch, Losses, Task


def validation_batches(task: Task, config: DictConfig, accelerator: Accelerator) -> list[Batch]:
    """Micro-batches of the valid split, the same at every validation."""
    loader = task.loader("valid", config.data.batch_size, accelerator.process_index, accelerator.num_processes)
    count = min(config.train.eval_batches, loader.steps_per_epoch)
    return [micro for n in range(count) for micro in micro_batches(loader.batch(n), config.train.micro_batch_size)]


def validate(
    task: Task,
    trained_modules: dict[str, TrainedModule],
    ema: EMA | None,
    batches: list[Batch],
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean losses over the validation batches with the averaged weights, named valid/..."""
    totals: Losses = {}
    denominators = global_denominators(task, batches, accelerator)
    modules = {name: module.module for name, module in trained_modules.items()}
    with torch.no_grad(), rng.isolated_rng(0), evaluating(trained_modules, ema):
        for batch in batches:
            losses = task.validation(modules, to_device(batch, accelerator.device), denominators, step)
            accumulate(totals, {"loss": total_loss(losses, task.loss_weights), **losses})
    values = to_numbers(all_reduce_losses(totals, accelerator))
    return {f"valid/{name}": value for name, value in values.items()}


@contextlib.contextmanager
def evaluating(trained_modules: dict[str, TrainedModule], ema: EMA | None) -> Iterator[None]:
    """Modules in eval mode, the model with its averaged weights. All ranks must enter and leave."""
    with ema.average_weights() if ema is not None else contextlib.nullcontext():
        for module in trained_modules.values():
            module.module.eval()
        try:
            yield
        finally:
            for module in trained_modules.values():
                reshard(module.module)
