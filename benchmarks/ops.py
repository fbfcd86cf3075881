"""Forward and backward of the mixers on one thread beside other implementations at the same sizes; cost and memory.

    python benchmarks/ops.py --out benchmarks/results/ops

Peers: transformers' Mamba2Mixer (its chunk of 256 and one of 64) and MambaMixer (its torch paths), mambapy's parallel
scan (`pip install mambapy`), scaled dot-product attention. A case's ratio is its time over ours.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import Times, paired, report, summary
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ssmttm.mixers import build_mixer
from ssmttm.ops.selective_scan import selective_scan

OURS = "ssmttm"
LENGTHS = (512, 1024, 2048)


def training_pass(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward, gradients of the input too."""

    def run() -> None:
        x.grad = None
        module(x).square().mean().backward()

    return run


def inputs(length: int, d_model: int) -> Tensor:
    return torch.randn(1, length, d_model, requires_grad=True)


def transformers_mamba2(d_model: int, d_state: int, chunk_size: int) -> nn.Module:
    config = Mamba2Config(
        hidden_size=d_model, state_size=d_state, expand=2, head_dim=64, num_heads=2 * d_model // 64, n_groups=1,
        chunk_size=chunk_size,
    )  # fmt: skip
    return Mamba2Mixer(config, layer_idx=0)


def mamba2_cases(d_model: int, length: int) -> dict[str, Callable[[], None]]:
    x = inputs(length, d_model)
    modules = {
        OURS: build_mixer("mamba2", d_model, d_state=128),
        "transformers Mamba2Mixer (256)": transformers_mamba2(d_model, 128, 256),
        "transformers Mamba2Mixer (64)": transformers_mamba2(d_model, 128, 64),
    }
    return {name: training_pass(module, x) for name, module in modules.items()}


def scan_cases(length: int) -> dict[str, Callable[[], None]]:
    """Mamba-1's scan alone: D 1024, N 16."""
    D, N = 1024, 16
    x, B, C = (torch.randn(1, length, n, requires_grad=True) for n in (D, N, N))
    dt = torch.rand(1, length, D).mul(0.1).requires_grad_()
    A = -torch.rand(D, N).mul(16).add(0.1)
    A.requires_grad_()

    def ours() -> None:
        selective_scan(x, dt, A, B, C)[0].square().mean().backward()

    cases = {OURS: ours}
    try:
        from mambapy.pscan import pscan
    except ImportError:
        print("mambapy is not installed: its scan is left out (pip install mambapy)")
        return cases

    def theirs() -> None:
        decay = torch.exp(dt[..., None] * A)  # [B, T, D, N]
        states = pscan(decay, (dt * x)[..., None] * B[:, :, None])
        (states @ C[..., None])[..., 0].square().mean().backward()

    return {**cases, "mambapy pscan": theirs}


def mamba1_cases(length: int) -> dict[str, Callable[[], None]]:
    x = inputs(length, 512)
    config = MambaConfig(hidden_size=512, state_size=16, expand=2, conv_kernel=4)
    modules = {OURS: build_mixer("mamba1", 512), "transformers MambaMixer": MambaMixer(config, layer_idx=0)}
    return {name: training_pass(module, x) for name, module in modules.items()}


def mixer_cases(length: int) -> dict[str, Callable[[], None]]:
    """Every mixer of ours at d 512: what is compared when a config swaps them."""
    x = inputs(length, 512)
    names = ("mamba2", "mamba1", "mamba3", "s4d", "attention")
    return {name: training_pass(build_mixer(name, 512, headdim=64), x) for name in names}


def growth(times: dict[int, Times], name: str) -> float:
    """Exponent of the cost from the first to the last length, from the fastest tenth of the rounds."""
    first, last = min(times), max(times)
    fast = {length: sorted(times[length][name])[len(times[length][name]) // 10] for length in (first, last)}
    return math.log(fast[last] / fast[first]) / math.log(last / first)


def peak_memory(name: str, length: int) -> float:
    """MB that one pass at d 512 adds to a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--length", str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(name: str, length: int) -> None:
    """Print how much the largest resident size grows by in one pass, in MB."""
    torch.set_num_threads(1)
    cases = mamba2_cases(512, 64)
    cases[name]()  # what is allocated once
    before = _largest_resident()
    mamba2_cases(512, length)[name]()
    print(_largest_resident() - before)


def _largest_resident() -> float:
    """The largest resident size of this process so far, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ops"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=1024, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        measure_peak(arguments.peak_of, arguments.length)
        return
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    by_length: dict[int, Times] = {}
    for length in LENGTHS:
        by_length[length] = paired(mamba2_cases(512, length), arguments.rounds, f"Mamba-2, d 512, T {length}")
        results[f"Mamba-2 layer, d 512, T {length}"] = summary(by_length[length], OURS)
    wide = paired(mamba2_cases(1024, 1024), arguments.rounds, "Mamba-2, d 1024, T 1024")
    results["Mamba-2 layer, d 1024, T 1024"] = summary(wide, OURS)
    slow = paired(mamba1_cases(512), 2, "Mamba-1, d 512, T 512")  # some 10 s a pass of the peer's
    results["Mamba-1 layer, d 512, T 512"] = summary(slow, OURS)
    for length in (512, 2048):
        times = paired(scan_cases(length), arguments.rounds, f"Mamba-1 scan, T {length}")
        results[f"Mamba-1 scan, D 1024, N 16, T {length}"] = summary(times, OURS)
        mixers = paired(mixer_cases(length), arguments.rounds, f"mixers, T {length}")
        results[f"every mixer, d 512, T {length}"] = summary(mixers, "mamba2")
    report(results, arguments.out, "Forward and backward, batch 1, float32")
    print(f"\ngrowth exponent of our Mamba-2 from T {LENGTHS[0]} to {LENGTHS[-1]}: {growth(by_length, OURS):.2f}")
    memory = {name: peak_memory(name, 1024) for name in mamba2_cases(512, 64)}
    for name, megabytes in memory.items():
        print(f"peak memory of a pass, d 512, T 1024: {name:34} {megabytes:7.0f} MB")


if __name__ == "__main__":
    main()
