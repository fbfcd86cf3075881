"""Training on a CPU: kept memory and detection of bf16."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssmttm.training import cpu

FAULTS = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: with huge pages there are few faults to save
from ssmttm.training.cpu import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
torch.set_num_threads(1)
x = torch.zeros(16_000_000)  # 64 MB: by default glibc maps it again each time
for _ in range(20):  # until the heap has grown
    (x + 1).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    (x + 1).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_kept_memory_causes_fewer_page_faults():
    assert page_faults("keep") < 0.5 * page_faults("default")


def test_memory_is_not_kept_if_an_environment_variable_says_so(monkeypatch):
    for name, value in [("SSMTTM_KEEP_FREED_MEMORY", "0"), ("MALLOC_TRIM_THRESHOLD_", "100000"),
                        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=100000")]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert cpu.keep_freed_memory() is False


@pytest.mark.parametrize(("flags", "expected"), [("avx2 avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)])
def test_bf16_is_detected_from_cpuinfo(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags : fpu {flags}")
    assert cpu.has_bf16() is expected
