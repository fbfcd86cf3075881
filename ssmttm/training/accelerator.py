"""Device and precision of a training."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ssmttm.errors import UserError
from ssmttm.training.cpu import has_bf16, keep_freed_memory


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
