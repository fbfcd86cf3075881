"""Device and precision of a training."""

import os
import resource

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ssmttm.errors import UserError
from ssmttm.training.cpu import has_bf16, keep_freed_memory


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
