"""Device, precision and processes of a training."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import distributed

from ssmttm.errors import UserError
from ssmttm.training.cpu import has_bf16, keep_freed_memory

_LONGEST_WAIT = timedelta(days=30)


class Barrier:
    """Waits for all processes, however long that takes.

    The main process samples, verifies and writes checkpoints alone. The others would meet it in the next all-reduce,
    which fails after the time limit of the process group. So they wait here first, in a gloo group of their own. All
    processes must construct it and call `wait` together; a process that died ends the wait.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group = None
        if accelerator.num_processes > 1:
            self._group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def wait(self) -> None:
        if self._group is not None:
            distributed.barrier(group=self._group)


def build_accelerator(precision: str) -> Accelerator:
    """The accelerator for `train.precision`: auto, fp32 or bf16. Raises UserError for one that is not supported."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"unknown train.precision={precision}: choose from auto, fp32, bf16")
    gpu = torch.cuda.is_available()
    capable = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_bf16()
    if precision == "bf16" and gpu and not capable:
        raise UserError("train.precision=bf16: this GPU has no bf16, use fp32")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and capable) else "no"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    on_cpu = not gpu and "WORLD_SIZE" in os.environ  # else Accelerate trains each launched process on its own
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[ddp])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
