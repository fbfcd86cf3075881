"""Tokens a second of the tiny model's training, beside an earlier commit: python -m benchmarks.training_speed

A step is forward, loss, backward, clipping, AdamW and the average of the weights, on a batch of experiment=tiny (8
items of 200 frames of 8 codebooks), in the precision that a training chooses here. With --baseline DIR, a checkout of
another commit, its code runs in a process of its own; the processes take turns, step by step, so that noise of the
machine affects all equally. Writes benchmarks/results/training_speed.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.paired import environment, paired, summary

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "training_speed.json"
WORKER = """
import sys
import torch
from ssmttm import config
from ssmttm.models import build_model
from ssmttm.text.condition import TextCondition
from ssmttm.training.cpu import has_bf16, keep_freed_memory
from ssmttm.training.ema import EMA
keep_freed_memory()
case, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)
settings = config.load("experiment=tiny")
model = build_model(settings.model)
if case == "baseline":
    from ssmttm.training.lm import token_losses
    from ssmttm.training.optim import build_optimizer
    optimizer = build_optimizer(model, settings.optim)
else:
    from ssmttm.training.optim import build_optimizers
    from ssmttm.training.recompute import set_up_blocks
    from ssmttm.training.tasks.lm import token_losses
    optimizer = build_optimizers(model, settings.optim)["adamw"]
    set_up_blocks(model, "none", compiled=case == "compiled")
ema, c = EMA(model, 0.98), model.config
codes = torch.randint(c.codebook_size, (8, c.n_codebooks, 207))
text = TextCondition.stack([torch.randn(16, c.text_dim) for _ in range(8)])
valid, count = torch.ones_like(codes, dtype=torch.bool), 0
print("ready", flush=True)
for line in sys.stdin:
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
        losses = token_losses(model(codes, text), codes, valid, c.codebook_size, 0.0)
    (losses[1].sum() / codes.numel()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    count += 1
    ema.update(count)
    print(float(losses[0].sum()), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="a checkout of another commit")
    parser.add_argument("--compiled", action="store_true", help="also with train.compile=true")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args()
    folders = {"baseline": args.baseline} if args.baseline else {}
    folders |= {"eager": ROOT} | ({"compiled": ROOT} if args.compiled else {})
    workers = {name: Worker(name, folder, args.threads) for name, folder in folders.items()}
    metrics = summary(paired({name: worker.step for name, worker in workers.items()}, args.rounds, "steps"), "eager")
    for name, worker in workers.items():
        metrics[name]["losses"] = worker.losses[:3]
        row = metrics[name]
        print(f"{name:10} {row['median_ms']:8.1f} ms   {row['ratio']:.2f} x eager   {worker.losses[:3]}")
        worker.close()
    OUT.write_text(json.dumps({"environment": environment(), "results": metrics}, indent=1) + "\n")
    print(OUT)


class Worker:
    """A process that trains, a step at a time; `losses` are those of its steps."""

    def __init__(self, case: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-c", WORKER, case, str(threads)]
        environment = os.environ | {
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "1000",  # spinning as a training does, too short to disturb the other one
        }
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.losses: list[float] = []
        assert self._read() == "ready"

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.losses.append(float(self._read()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


if __name__ == "__main__":
    main()
