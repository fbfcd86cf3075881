"""A sweep's jobs: every point of the grid, with every seed, as overrides of one experiment."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm import config
from ssmttm.errors import UserError
from ssmttm.models.size import fit_budget, parse_count, size_of

_TEXT_TOKENS = 32  # of a caption, when FLOPs are foreseen


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of its folder, made of the labels.
        labels: its place in the grid, and its seed.
        overrides: what `train.py` is given besides store and run folder.
        seconds: of training; set, `train.steps` is found by timing the first steps.
    """

    name: str
    labels: dict[str, str]
    overrides: list[str]
    seconds: float | None = None

    def document(self) -> dict[str, Any]:
        """As job.json holds it."""
        return asdict(self)


def expand(sweep: DictConfig) -> list[Job]:
    """All jobs of a sweep's grid.

    Raises:
        UserError: `check` refuses, an axis that is none, two points of one name, or an override that the training's
            config does not know.
    """
    check(sweep)
    budget = budget_of(sweep)
    axes = {name: _points(name, axis) for name, axis in OmegaConf.to_container(sweep.grid, resolve=True).items()}
    jobs = []
    for seed in sweep.seeds:
        for point in itertools.product(*(axis.items() for axis in axes.values())):
            labels = dict(zip(axes, (label for label, _ in point), strict=True))
            chosen = [override for _, overrides in point for override in overrides]
            overrides = sized([f"experiment={sweep.experiment}", *sweep.overrides, *chosen, f"seed={seed}"], sweep)
            jobs.append(make_job({**labels, "seed": str(seed)}, overrides, budget))
    if twice := {job.name for job in jobs if sum(other.name == job.name for other in jobs) > 1}:
        raise UserError(f"two points of the grid are both named {min(twice)}: give the axis labels of its own")
    return jobs


def check(sweep: DictConfig) -> None:
    """Raises UserError for a sweep without experiment or seeds, or with a budget that is none."""
    if not sweep.experiment:
        raise UserError(f"no sweep is named: give sweep=NAME, one of {', '.join(config.names('sweep'))}")
    if not sweep.seeds:
        raise UserError("sweep.seeds is empty: give at least one, such as sweep.seeds=[0]")
    budget = budget_of(sweep)
    if len(budget) > 1:
        raise UserError(f"sweep.budget has {' and '.join(budget)}: keep one, and set the others to null")
    if low := [f"{kind}={amount}" for kind, amount in budget.items() if amount <= 0]:
        raise UserError(f"sweep.budget.{low[0]}: give more than 0")


def budget_of(sweep: DictConfig) -> dict[str, float]:
    """What the sweep's budget limits, and how much of it there is."""
    return {kind: amount for kind, amount in sweep.budget.items() if amount is not None}


def make_job(labels: Mapping[str, str], overrides: list[str], budget: Mapping[str, float]) -> Job:
    """A job that lasts as long as the budget says."""
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(f"seed{v}" if k == "seed" else v for k, v in labels.items()))
    return Job(name, dict(labels), [*overrides, *_length(overrides, budget)], budget.get("seconds"))


def sized(overrides: list[str], sweep: DictConfig) -> list[str]:
    """The overrides, with one `experiment` only (the last), and the model brought to the sweep's size."""
    experiment = [override for override in overrides if override.startswith("experiment=")][-1:]
    overrides = [*experiment, *(override for override in overrides if not override.startswith("experiment="))]
    if sweep.match is None:
        config.load(*overrides)  # a mistake is told before anything runs
        return overrides
    if "parameters" not in sweep.match:
        raise UserError("sweep.match has no parameters: write {parameters: 300M, vary: n_layers}")
    parameters, vary = parse_count(str(sweep.match.parameters)), sweep.match.get("vary", "n_layers")
    fit = fit_budget(config.load(*overrides).model, parameters, vary)
    return [*overrides, f"model.{fit.key}={fit.value}"]


def _points(name: str, axis: Any) -> dict[str, list[str]]:
    """An axis as {label: overrides}."""
    if isinstance(axis, list) and axis:
        values = ["null" if value is None else str(value) for value in axis]
        return {value: [f"{name}={value}"] for value in values}
    if isinstance(axis, dict) and axis and all(isinstance(overrides, list) for overrides in axis.values()):
        return {str(label): [str(override) for override in overrides] for label, overrides in axis.items()}
    raise UserError(f"sweep.grid.{name} is no axis: write a list of values, or {{label: [overrides]}}")


def _length(overrides: list[str], budget: Mapping[str, float]) -> list[str]:
    if "steps" in budget:
        return [f"train.steps={int(budget['steps'])}"]
    if "flops" in budget:
        composed = config.load(*overrides)
        size, data = size_of(composed.model, composed.data.frames, _TEXT_TOKENS), composed.data
        return [f"train.steps={max(1, round(budget['flops'] / (3 * size.forward * data.frames * data.batch_size)))}"]
    return []
