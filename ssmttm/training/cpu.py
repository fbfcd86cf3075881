"""What makes training on a CPU quick: bf16 where the processor has it, and memory that is kept between steps."""

import ctypes
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices natively (AVX512-BF16 or AMX); elsewhere fp32 is quicker."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split()))


def keep_freed_memory() -> bool:
    """Let the C allocator keep what is freed, instead of giving large tensors back to the system after each use.

    On a CPU every step makes and drops the same large tensors. glibc maps and unmaps them each time, and the kernel
    clears the pages anew: a fifth of a step of the tiny language model (docs/training.md). A program that never frees
    for good loses nothing.

    Returns:
        Whether it took effect; only glibc has these settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return mallopt is not None and all(mallopt(option, value) for option, value in wanted.items())
