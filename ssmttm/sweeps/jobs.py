"""The jobs of a sweep: every point of the grid with every seed, as overrides of one experiment."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm import config
from ssmttm.errors import UserError
from ssmttm.models.size import fit_budget, parse_count, size_of

_TEXT_TOKENS = 32  # caption length assumed for FLOPs


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of its folder, from the labels.
        labels: its point in the grid, and its seed.
        overrides: of `train.py`, without store and run folder.
        seconds: training time; if set, `train.steps` is found by timing the first steps.
    """

    name: str
    labels: dict[str, str]
    overrides: list[str]
    seconds: float | None = None


def expand(sweep: DictConfig) -> list[Job]:
    """All jobs of a sweep's grid.

    Raises:
        UserError: see `check_sweep`; an invalid axis; two points with the same name; an unknown override.
    """
    check_sweep(sweep)
    budget = budget_of(sweep)
    grid: Any = OmegaConf.to_container(sweep.grid, resolve=True)
    axes = {str(name): _points(name, axis) for name, axis in grid.items()}
    jobs = []
    for seed in sweep.seeds:
        for labels in itertools.product(*axes.values()):
            points = dict(zip(axes, labels, strict=True))
            chosen = [override for name, label in points.items() for override in axes[name][label]]
            overrides = match_size([f"experiment={sweep.experiment}", *sweep.overrides, *chosen, f"seed={seed}"], sweep)
            jobs.append(make_job({**points, "seed": str(seed)}, overrides, budget))
    duplicates = sorted(name for name, count in Counter(job.name for job in jobs).items() if count > 1)
    if duplicates:
        raise UserError(f"two points of the grid are both named {duplicates[0]}: give the axis distinct labels")
    return jobs


def check_sweep(sweep: DictConfig) -> None:
    """Raises UserError for a sweep without experiment or seeds, or with an invalid budget."""
    if not sweep.experiment:
        raise UserError(f"no sweep is set: set sweep=NAME, one of {', '.join(config.names('sweep'))}")
    if not sweep.seeds:
        raise UserError("sweep.seeds is empty: set at least one, such as sweep.seeds=[0]")
    budget = budget_of(sweep)
    if len(budget) > 1:
        raise UserError(f"sweep.budget has {' and '.join(budget)}: keep one and set the others to null")
    for kind, amount in budget.items():
        if amount <= 0:
            raise UserError(f"sweep.budget.{kind} must be more than 0, got {amount}")


def budget_of(sweep: DictConfig) -> dict[str, float]:
    """The sweep's budget without the entries that are null."""
    return {kind: amount for kind, amount in sweep.budget.items() if amount is not None}


def make_job(labels: Mapping[str, str], overrides: list[str], budget: Mapping[str, float]) -> Job:
    """A job whose length is set by the budget."""
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(f"seed{v}" if k == "seed" else v for k, v in labels.items()))
    return Job(name, dict(labels), [*overrides, *_length(overrides, budget)], budget.get("seconds"))


def match_size(overrides: list[str], sweep: DictConfig) -> list[str]:
    """The overrides with one `experiment` only, the last, and with the model fitted to `sweep.match`."""
    experiment = [override for override in overrides if override.startswith("experiment=")][-1:]
    overrides = [*experiment, *(override for override in overrides if not override.startswith("experiment="))]
    settings = config.load(*overrides)  # a mistake is an error before anything runs
    if sweep.match is None:
        return overrides
    if "parameters" not in sweep.match:
        raise UserError("sweep.match has no parameters: write {parameters: 300M, vary: n_layers}")
    parameters = parse_count(str(sweep.match.parameters))
    fit = fit_budget(config.model_section(settings), parameters, sweep.match.get("vary", "n_layers"))
    return [*overrides, f"model.{fit.key}={fit.value}"]


def _points(name: str, axis: Any) -> dict[str, list[str]]:
    """An axis as {label: overrides}."""
    if isinstance(axis, list) and axis:
        values = ["null" if value is None else str(value) for value in axis]
        return {value: [f"{name}={value}"] for value in values}
    if isinstance(axis, dict) and axis and all(isinstance(overrides, list) for overrides in axis.values()):
        return {str(label): [str(override) for override in overrides] for label, overrides in axis.items()}
    raise UserError(f"sweep.grid.{name} must be a list of values, or {{label: [overrides]}}")


def _length(overrides: list[str], budget: Mapping[str, float]) -> list[str]:
    if "steps" in budget:
        return [f"train.steps={int(budget['steps'])}"]
    if "flops" in budget:
        settings = config.load(*overrides)
        forward = size_of(config.model_section(settings), settings.data.frames, _TEXT_TOKENS).forward
        flops_per_step = 3 * forward * settings.data.frames * settings.data.batch_size
        return [f"train.steps={max(1, round(budget['flops'] / flops_per_step))}"]
    return []
