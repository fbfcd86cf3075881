"""What the training loop costs beside the bare step: python -m benchmarks.training_loop STORE

Trains experiment=tiny for some steps on the store and compares the time of the loop with that of what it calls: forward
and backward, clipping, the optimiser and the average of the weights. Writes benchmarks/results/training_loop.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import environment
from ssmttm import config
from ssmttm.training import loop
from ssmttm.training.ema import EMA
from ssmttm.training.step import TrainedModule

OUT = Path(__file__).parent / "results" / "training_loop.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="made by `python -m data_prep`")
    parser.add_argument("--steps", type=int, default=40, help="the first five are not counted (default: %(default)s)")
    parser.add_argument("--experiment", default="tiny", help="(default: %(default)s)")
    args = parser.parse_args()
    bare, begun = [0.0], [time.perf_counter()]
    bare_by_step: list[float] = []

    def timed(function: Callable[..., Any], ends_step: bool = False) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*values, **options)
            bare[0] += time.perf_counter() - start
            if ends_step:
                bare_by_step.append(bare[0])
                bare[0] = 0.0
                begun.append(time.perf_counter())
            return result

        return call

    loop.gradients, loop.clip_gradients = timed(loop.gradients), timed(loop.clip_gradients)
    TrainedModule.update = timed(TrainedModule.update)  # type: ignore[method-assign]
    EMA.update = timed(EMA.update, ends_step=True)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"experiment={args.experiment}", f"train.steps={args.steps}", config.override("run_dir", folder)]
        settings += [config.override("data.store", args.store), "train.eval_every=0", "train.checkpoint_every=0"]
        loop.train(config.load(*settings, "train.log_every=10"))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    total = np.diff(begun)[5:]  # from the end of one step to that of the next
    inside = np.array(bare_by_step)[5:]
    result = {
        "loop_overhead": float(1 - inside.sum() / total.sum()),
        "data_wait": float(np.mean([row["data_wait"] for row in rows[1:]])),
        "seconds_per_step": float(np.median(total)),
    }
    print({name: round(value, 4) for name, value in result.items()})
    OUT.write_text(json.dumps({"environment": environment(), "results": result}, indent=1) + "\n")
    print(OUT)


if __name__ == "__main__":
    main()
