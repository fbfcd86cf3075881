"""Speed on a CPU: detection of bf16 instructions, and an allocator that keeps freed memory between steps."""

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)

_GLIBC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def has_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions (AVX512-BF16 or AMX); without them fp32 is faster."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split()))


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning large tensors to the system after each use.

    Every step allocates the same large tensors. By default glibc maps and unmaps them each time and the kernel clears
    the pages: a fifth of a step of the tiny language model (docs/training.md). The memory of the process then hardly
    shrinks again. Returns False without glibc, with SSMTTM_KEEP_FREED_MEMORY=0, or if a variable of glibc sets its
    thresholds.
    """
    if not sys.platform.startswith("linux") or os.environ.get("SSMTTM_KEEP_FREED_MEMORY") == "0":
        return False
    if any(name in os.environ for name in _GLIBC_SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
