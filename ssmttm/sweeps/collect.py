"""What a sweep's jobs have recorded, as plain rows: one `Run` a job, one `Group` the runs that differ by seed only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmttm import checkpoint
from ssmttm.launch.training_job import is_done, is_failed, read_metrics
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job

SPENT = ("step", "samples", "flops", "seconds")  # what a curve can be drawn against


@dataclass(frozen=True)
class Run:
    """One job's outcome.

    Attributes:
        status: done, failed, unfinished or not begun.
        parameters: of the model; None before its first checkpoint.
        spent: [n] at each validation, by SPENT.
        loss: [n], the sweep's metric there.
        figures: what `ssmttm evaluate` measured, by name.
    """

    job: Job
    status: str
    parameters: int | None
    spent: dict[str, np.ndarray]
    loss: np.ndarray
    metrics: dict[str, float]

    def at(self, kind: str, amount: float) -> float:
        """The metric when so much of one of SPENT was spent, between two validations by a straight line.

        NaN before the first validation: what a run was worth then is not known.
        """
        return float(np.interp(amount, self.spent[kind], self.loss, left=np.nan))


@dataclass(frozen=True)
class Group:
    """Runs of one point of the grid, one a seed, that have recorded at least one validation."""

    name: str
    runs: list[Run]

    @property
    def parameters(self) -> int:
        """Of the model, the same for every seed."""
        return next((run.parameters for run in self.runs if run.parameters), 0)

    def furthest(self, kind: str) -> float:
        """How much every seed has spent at least."""
        return min(float(run.spent[kind][-1]) for run in self.runs)

    def at(self, kind: str, amount: float) -> np.ndarray:
        """The metric of each seed there. [seeds]"""
        return np.array([run.at(kind, amount) for run in self.runs])


def collect(folder: SweepFolder) -> list[Run]:
    """Every job's run, in the grid's order; those that the grid has no longer come last."""
    sweep = folder.config().sweep
    places = {name: [str(point) for point in axis] for name, axis in sweep.grid.items()}

    def place(job: Job) -> list[int]:
        found = ((axis, job.labels.get(name)) for name, axis in places.items())
        return [axis.index(label) if label in axis else len(axis) for axis, label in found]

    return [_run(folder.job_folder(job.name), job, sweep.metric) for job in sorted(folder.jobs(), key=place)]


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ by seed only, together; those without a validation are left out."""
    names: dict[str, list[Run]] = {}
    for run in runs:
        if len(run.loss):
            names.setdefault(", ".join(v for k, v in run.job.labels.items() if k != "seed") or "all", []).append(run)
    return [Group(name, members) for name, members in names.items()]


def _run(folder: Path, job: Job, metric: str) -> Run:
    rows = read_metrics(folder / "run")
    train = [row for row in rows if "flops" in row]
    valid = [row for row in rows if metric in row]
    steps = [row["step"] for row in valid]
    spent = {
        kind: np.interp(steps, [0, *(row["step"] for row in train)], [0, *(row[kind] for row in train)])
        for kind in SPENT
    }
    begun = "unfinished" if rows else "not begun"
    status = "done" if is_done(folder) else "failed" if is_failed(folder) else begun
    kept = checkpoint.checkpoints(folder / "run")
    parameters = checkpoint.read_state(kept[-1])["parameters"] if kept else None
    report = folder / "evaluation" / "figures.json"
    metrics = {f["name"]: f["value"] for f in json.loads(report.read_text())["metrics"]} if report.is_file() else {}
    return Run(job, status, parameters, spent, np.array([row[metric] for row in valid]), metrics)
