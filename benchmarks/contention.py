"""Sampling and training alone, beside one and beside four busy processes, with several settings of torch's threads.

    python -m benchmarks.contention

Every setting has a process of its own, as OpenMP reads its environment once; all of them take turns within each round.
A busy process computes on one core without a pause. Sampling: clips of the embedded model; training: steps of the model
of experiment=tiny (forward, backward, AdamW; bf16 where the processor has it) on 2 items of 2 s. Rates are seconds of
audio a second. Writes benchmarks/results/contention.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssmttm import threads

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "contention.json"
TASKS, BUSY = ("sampling", "training"), (0, 1, 4)
CLIP_SECONDS, ITEMS, FRAMES = 1.0, 2, 50
SHORTEST = 1.5  # seconds of a measurement
OURS = "ours"
_OPENMP = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


WAYS: dict[str, dict[str, str]] = {  # the environment of each way
    "torch's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    OURS: {},
}


class Worker:
    """A process that samples or trains on request."""

    def __init__(self, task: str, way: str) -> None:
        rest = {name: value for name, value in os.environ.items() if name not in _OPENMP}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contention", "--worker", task, way], cwd=ROOT, env=rest | WAYS[way],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def measure(self) -> float:
        """Seconds of audio a second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """So many processes that compute, one thread each."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work(task: str, way: str) -> None:
    """Measure whenever a line comes on standard input. Ours: as sample.py and train.py set their threads."""
    once = {"sampling": sampling, "training": training}[task]()
    if way == OURS and task == "sampling":
        threads.use_threads(1)
    with threads.spin_when_alone() if way == OURS else contextlib.nullcontext():
        once()
        for _ in sys.stdin:
            once()
            start, audio_seconds = time.perf_counter(), 0.0
            while time.perf_counter() - start < SHORTEST:
                audio_seconds += once()
            print(audio_seconds / (time.perf_counter() - start), flush=True)


def sampling() -> Callable[[], float]:
    """Samples one clip; returns its seconds."""
    from ssmttm import MusicPipeline

    pipe = MusicPipeline.from_pretrained()

    def once() -> float:
        pipe("a slow waltz in D minor on a music box", duration=CLIP_SECONDS)
        return CLIP_SECONDS

    return once


def training() -> Callable[[], float]:
    """One optimiser step; returns the seconds of audio in its batch."""
    import torch
    import torch.nn.functional as F

    from ssmttm import config
    from ssmttm.models import build_model
    from ssmttm.text.condition import TextCondition
    from ssmttm.training.cpu import has_bf16, keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(config.load("experiment=tiny").model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    codes = torch.randint(model.config.codebook_size, (ITEMS, model.config.n_codebooks, FRAMES))
    text = TextCondition.stack([torch.randn(16, model.config.text_dim) for _ in range(ITEMS)])

    def once() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            logits = model(codes, text)
        F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return ITEMS * FRAMES / 25

    return once


def measured(task: str, rounds: int) -> dict[str, Any]:
    """Median and 10th percentile of the rate by number of busy processes and way, and the machine's load."""
    workers = {way: Worker(task, way) for way in WAYS}
    found: dict[str, Any] = {}
    try:
        for worker in workers.values():
            worker.measure()
        for n in BUSY:
            rates: dict[str, list[float]] = {name: [] for name in WAYS}
            with busy_processes(n):
                for _ in range(rounds):
                    for name, worker in workers.items():
                        rates[name].append(worker.measure())
            load = [round(value, 2) for value in os.getloadavg()]
            rows = {
                way: {"median": statistics.median(values), "p10": quantile(values, 0.1)}
                for way, values in rates.items()
            }
            found[f"{n} busy"] = {"load": load, "rates": rows}
            for name, row in rows.items():
                print(f"{task:9} {n} busy  {name:18} {row['median']:7.3f}  p10 {row['p10']:7.3f}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def quantile(values: list[float], q: float) -> float:
    """The value below which a share q of the values lies, the nearest lower one."""
    return sorted(values)[int(q * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    load = [round(value, 2) for value in os.getloadavg()]  # that of other programs
    results = {task: measured(task, arguments.rounds) for task in TASKS}
    from benchmarks.paired import environment

    document = {"environment": environment() | {"load": load, "rounds": arguments.rounds}, "results": results}
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(OUT)


if __name__ == "__main__":
    main()
