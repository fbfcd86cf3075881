"""One job of a sweep at work, and the metrics that it writes.

JOB/timing/       a short run that measures the time of a step, if the budget is in seconds
JOB/run/          the training
JOB/evaluation/   results of `ssmttm evaluate`, if the sweep has `evaluate`
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ssmttm.config import override
from ssmttm.launch.job import CommandJob, train_command
from ssmttm.launch.local import Slot
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job

_PORT = 29_500  # of the first slot's Accelerate processes
_TIMED_STEPS = 30
_TAIL = 65_536  # bytes at the end of metrics.jsonl that are searched for the last step


class TrainingJob(CommandJob):
    """Training and, if the sweep has `evaluate`, evaluation of one job, on the GPUs of a slot."""

    def __init__(self, folder: SweepFolder, job: Job, settings: DictConfig, slot: Slot = Slot()) -> None:  # noqa: B008
        launcher = settings.launcher
        self.job, self._sweep_folder, self._store = job, folder, str(settings.store)
        self._evaluate = None if settings.sweep.evaluate is None else list(settings.sweep.evaluate)
        self._train = train_command(launcher.accelerate, _PORT + slot.index)
        stages = [*(["timing"] if job.seconds else []), "run", *(["evaluation"] if self._evaluate else [])]
        environment = {"OMP_NUM_THREADS": str(launcher.threads), "TOKENIZERS_PARALLELISM": "false"}
        if slot.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpus
        super().__init__(folder.job_folder(job.name), stages, launcher.retries, environment)

    def command(self, stage: str) -> list[str]:
        """See `CommandJob.command`."""
        folder = self.folder / stage
        if stage == "evaluation":
            keys = {"checkpoint": self.folder / "run", "store": self._store, "out": folder}
            overrides = [*(self._evaluate or ()), *(override(key, value) for key, value in keys.items())]
            return [sys.executable, "-m", "ssmttm.cli.main", "evaluate", *overrides]
        overrides = [*self.job.overrides, override("data.store", self._store), override("run_dir", folder)]
        if stage == "timing":
            overrides += [f"train.steps={_TIMED_STEPS}", "train.log_every=5", "train.eval_every=0"]
        elif self.job.seconds:
            overrides += [f"train.steps={_steps_within(self.job.seconds, self.folder / 'timing')}"]
        return [*self._train, *overrides]

    def is_done(self) -> bool:
        """See `CommandJob.is_done`."""
        return self._sweep_folder.is_done(self.job.name, self._evaluate)

    def summary(self) -> dict[str, Any]:
        """See `CommandJob.summary`."""
        return {"steps": self.step(), "evaluate": self._evaluate}

    def step(self) -> int:
        """The last training step, or 0."""
        return last_step(self.folder / "run")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; empty if there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The last step that a run has logged, or 0. Reads only the end of the file, as it is polled."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines else 0


def _steps_within(seconds: float, timing: Path) -> int:
    """How many steps fit into so many seconds, by the median of the timed ones without the first."""
    times = [row["seconds_per_step"] for row in read_metrics(timing) if "seconds_per_step" in row]
    return max(1, round(seconds / statistics.median(times[1:])))
