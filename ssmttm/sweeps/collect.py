"""Results of a sweep: a `Run` for each job, a `Group` for the runs that differ by seed only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssmttm import checkpoint
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job
from ssmttm.sweeps.training_job import read_metrics

SPENT = ("step", "samples", "flops", "seconds")  # x axes of the curves


@dataclass(frozen=True)
class Run:
    """Results of one job.

    Attributes:
        status: done, failed, unfinished or not started.
        parameters: of the model; None before its first checkpoint.
        spent: [n] by name in SPENT, at each validation.
        loss: [n], the sweep's metric at each validation.
        metrics: results of `ssmttm evaluate` by name.
    """

    job: Job
    status: str
    parameters: int | None
    spent: dict[str, np.ndarray]
    loss: np.ndarray
    metrics: dict[str, float]

    def at(self, kind: str, amount: float) -> float:
        """The metric after `amount` of one of SPENT, linear between validations; NaN before the first."""
        return float(np.interp(amount, self.spent[kind], self.loss, left=np.nan))


@dataclass(frozen=True)
class Group:
    """The runs of one point of the grid, one a seed, with at least one validation each."""

    name: str
    runs: list[Run]

    @property
    def parameters(self) -> int:
        """Parameters of the model, the same for every seed."""
        return next((run.parameters for run in self.runs if run.parameters), 0)

    def furthest(self, kind: str) -> float:
        """The amount that every seed has reached."""
        return min(float(run.spent[kind][-1]) for run in self.runs)

    def at(self, kind: str, amount: float) -> np.ndarray:
        """The metric of each seed after `amount`. [seeds]"""
        return np.array([run.at(kind, amount) for run in self.runs])


def collect(folder: SweepFolder) -> list[Run]:
    """The run of every job in the grid's order; jobs that are no longer in the grid come last."""
    sweep = folder.config().sweep
    axes = {name: [str(point) for point in axis] for name, axis in sweep.grid.items()}

    def position(job: Job) -> list[int]:
        labels = {name: job.labels.get(name, "") for name in axes}
        return [axis.index(labels[name]) if labels[name] in axis else len(axis) for name, axis in axes.items()]

    return [_run(folder, job, sweep.metric) for job in sorted(folder.jobs(), key=position)]


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs that differ by seed only; runs without a validation are left out."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        if len(run.loss):
            name = ", ".join(label for axis, label in run.job.labels.items() if axis != "seed") or "all"
            members.setdefault(name, []).append(run)
    return [Group(name, runs) for name, runs in members.items()]


def _run(sweep_folder: SweepFolder, job: Job, metric: str) -> Run:
    folder = sweep_folder.job_folder(job.name)
    rows = read_metrics(folder / "run")
    train = [row for row in rows if "flops" in row]
    valid = [row for row in rows if metric in row]
    steps = [row["step"] for row in valid]
    spent = {
        kind: np.interp(steps, [0, *(row["step"] for row in train)], [0, *(row[kind] for row in train)])
        for kind in SPENT
    }
    if sweep_folder.is_done(job.name):
        status = "done"
    elif sweep_folder.is_failed(job.name):
        status = "failed"
    else:
        status = "unfinished" if rows else "not started"
    checkpoints = checkpoint.checkpoints(folder / "run")
    parameters = checkpoint.read_state(checkpoints[-1])["parameters"] if checkpoints else None
    report = folder / "evaluation" / "metrics.json"
    metrics = {f["name"]: f["value"] for f in json.loads(report.read_text())["metrics"]} if report.is_file() else {}
    return Run(job, status, parameters, spent, np.array([row[metric] for row in valid]), metrics)
