"""Peak memory and time of a training step with recomputation: python -m benchmarks.training_memory

Forward and backward of the paper's Prefix SiMBA (model=prefix_simba) with 6 of its 24 layers, one item of 2,588 frames,
on the CPU, in the precision that a training chooses there. Each case is a process of its own, so that its peak is its
own; the times, of the clock and of the processor, are medians over steps and rounds. With --baseline DIR, a checkout of
an earlier commit, ratios are to that. Writes benchmarks/results/training_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.paired import environment

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "training_memory.json"
MODES = ("none", "selective", "full")
CASE = """
import json, resource, sys, time
import torch
import torch.nn.functional as F
from ssmttm import config
from ssmttm.models import build_model
from ssmttm.text.condition import TextCondition
from ssmttm.training.cpu import has_bf16, keep_freed_memory
mode, layers, frames, steps, threads = sys.argv[1], *map(int, sys.argv[2:])
keep_freed_memory()
torch.set_num_threads(threads)
torch.manual_seed(0)
model = build_model(config.load("model=prefix_simba", f"model.n_layers={layers}").model)
if mode != "baseline":
    from ssmttm.training.recompute import set_up_blocks
    set_up_blocks(model, mode, compiled=False)
codes = torch.randint(model.config.codebook_size, (1, model.config.n_codebooks, frames))
text = TextCondition.stack([torch.randn(16, model.config.text_dim)])
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start, times, cpu_times = resident(), [], []
for step in range(steps):
    begun, cpu_begun = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
        logits = model(codes, text)
    F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()).backward()
    times.append(time.perf_counter() - begun)
    cpu_times.append(time.process_time() - cpu_begun)
    model.zero_grad(set_to_none=True)
print(json.dumps({"peak_gib": resident(), "model_gib": start, "seconds": times[1:], "cpu_seconds": cpu_times[1:]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="a checkout of another commit")
    parser.add_argument("--layers", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=2588, help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=4, help="of a process, the first is not timed (default: %(default)s)"
    )
    parser.add_argument("--cases", nargs="+", default=MODES, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args()
    cases = {"baseline": args.baseline} if args.baseline else {}
    cases |= dict.fromkeys(args.cases, ROOT)
    found: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, folder in cases.items():
            sizes = map(str, (args.layers, args.frames, args.steps, args.threads))
            command = [sys.executable, "-c", CASE, name, *sizes]
            done = subprocess.run(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, check=True, capture_output=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    results = {name: summary(rounds) for name, rounds in found.items()}
    reference = results[next(iter(cases))]
    for name, row in results.items():
        peak, seconds, cpu = (row[key] / reference[key] for key in ("peak_gib", "seconds", "cpu_seconds"))
        times = f"{row['seconds']:6.2f} s  {seconds:.2f} x   processor {row['cpu_seconds']:6.2f} s  {cpu:.2f} x"
        print(f"{name:10} {row['peak_gib']:6.2f} GiB  {peak:.2f} x   {times}")
    OUT.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    print(OUT)


def summary(rounds: list[dict]) -> dict[str, float]:
    """The largest peak, and the median time."""
    seconds = [time for one in rounds for time in one["seconds"]]
    return {
        "peak_gib": max(one["peak_gib"] for one in rounds),
        "model_gib": max(one["model_gib"] for one in rounds),
        "seconds": float(np.median(seconds)),
        "p10_seconds": float(np.percentile(seconds, 10)),
        "cpu_seconds": float(np.median([time for one in rounds for time in one["cpu_seconds"]])),
    }


if __name__ == "__main__":
    main()
