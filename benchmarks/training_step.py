"""A training step of each backbone of the sweep backbones_tiny, side by side: python -m benchmarks.training_step

Forward and backward in bf16 on a batch of 8 x 8 s of one codebook's random codes, one thread. Writes
benchmarks/results/training_step.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.paired import environment, paired, summary
from ssmttm import config
from ssmttm.models import build_model
from ssmttm.sweeps.jobs import expand
from ssmttm.text.condition import TextCondition

OUT = Path(__file__).parent / "results" / "training_step.json"
ITEMS, FRAMES, TOKENS = 8, 200, 16
OURS = "prefix_simba"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases: dict[str, Callable[[], None]] = {}
    flops = {}
    for job in expand(config.load("sweep=backbones_tiny", "sweep.seeds=[0]", root="sweep").sweep):
        model = build_model(config.load(*job.overrides).model)
        name = job.labels["backbone"]
        cases[name], flops[name] = step_of(model), 3 * ITEMS * model.flops(FRAMES, TOKENS)
    metrics = summary(paired(cases, rounds, "training steps"), OURS)
    for name, row in metrics.items():
        row["gflops"] = flops[name] / 1e9
        print(f"{name:20} {row['median_ms']:7.1f} ms   {row['ratio']:.2f} x {OURS}   {row['gflops']:.1f} GFLOP")
    OUT.write_text(json.dumps({"environment": environment(), "results": metrics}, indent=1) + "\n")
    print(OUT)


def step_of(model: torch.nn.Module) -> Callable[[], None]:
    """Forward and backward on one batch."""
    codes = torch.randint(model.config.codebook_size, (ITEMS, model.config.n_codebooks, FRAMES))
    text = TextCondition.stack([torch.randn(TOKENS, model.config.text_dim) for _ in range(ITEMS)])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(codes, text)
        F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
