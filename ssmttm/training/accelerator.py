"""Device, precision and processes of a training."""

import os
import resource
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import distributed

from ssmttm.errors import UserError
from ssmttm.training.cpu import has_bf16, keep_freed_memory
from ssmttm.training.monitoring.watchdog import Watchdog

_LONGEST_WAIT = timedelta(days=30)


class Ranks:
    """What the processes of a training agree on, however long one of them takes.

    The main process samples, verifies and writes checkpoints alone. The others would meet it in the next all-reduce,
    which fails after the time limit of the process group. So they wait here first, in a gloo group of their own, on the
    CPU: no device is waited for. All processes must construct it and call its methods together; a process that died
    ends the wait, one that is late is named by the watchdog.
    """

    def __init__(self, accelerator: Accelerator, watchdog: Watchdog) -> None:
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._watchdog = watchdog
        self._group = None
        if self._world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def wait(self) -> None:
        """Wait for all processes."""
        self.any([])

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any process has set each flag."""
        if self._group is None:
            return list(flags)
        result = torch.tensor([False, *flags], dtype=torch.uint8)
        if self._rank == 0:
            others = [torch.empty_like(result) for _ in range(1, self._world_size)]
            requests = [distributed.irecv(other, rank, self._group) for rank, other in enumerate(others, 1)]
            for rank, request in enumerate(requests, 1):
                assert request is not None  # this rank is in the group
                with self._watchdog.doing(f"waiting for rank {rank}"):
                    request.wait()
            result = torch.stack([result, *others]).amax(0)
        else:
            distributed.send(result, 0, self._group)
        with self._watchdog.doing("waiting for rank 0"):
            distributed.broadcast(result, 0, self._group)
        return [bool(flag) for flag in result[1:]]


def build_accelerator(precision: str) -> Accelerator:
    """The accelerator for `train.precision`: auto, fp32 or bf16. Raises UserError for one that is not supported."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"unknown train.precision={precision}: choose from auto, fp32, bf16")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    capable = _has_bf16(device)
    if precision == "bf16" and device.type != "cpu" and not capable:
        raise UserError(f"train.precision=bf16: this {device.type} device has no bf16, use fp32")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and capable) else "no"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    on_cpu = device.type == "cpu" and "WORLD_SIZE" in os.environ  # else Accelerate trains each process on its own
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[ddp])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GiB: of the accelerator, or on a CPU resident memory."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.accelerator.max_memory_allocated(device) / 2**30


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 is fast on a device."""
    if device.type == "cpu":
        return has_bf16()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
