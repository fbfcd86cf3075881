"""A metric with the settings it was measured with; metrics with different settings cannot be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssmttm.errors import UserError

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One measured value with its 95 % interval."""

    name: str  # including the embedder's, such as fad_tiny
    value: float
    low: float
    high: float
    better: Direction
    fingerprint: Mapping[str, Any]  # everything that the value depends on except the model

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def compare(a: Metric, b: Metric) -> str:
    """One line: which of two metrics of one name is better, and whether their intervals overlap."""
    check_comparable([a, b])
    if a.value == b.value:
        return f"{a.name}: both are {a.value:.4g}"
    better, worse = (a, b) if (a.value < b.value) == (a.better == "lower") else (b, a)
    if a.name.startswith("fad_infinity") and max(a.value, b.value) < 0:
        return f"{a.name}: both are negative ({a.value:.4g}, {b.value:.4g}), that is 0, and cannot be ranked: use fad"
    disjoint = a.high < b.low or b.high < a.low
    which = "the first" if better is a else "the second"
    how = "the intervals do not overlap" if disjoint else "the intervals overlap"
    return f"{a.name}: {which} is better ({better.value:.4g} against {worse.value:.4g}); {how}"


def check_comparable(metrics: Sequence[Metric]) -> None:
    """Raise UserError unless all metrics have one name and one fingerprint; the message names the difference."""
    first = metrics[0]
    for other in metrics[1:]:
        if other.name != first.name:
            raise UserError(f"{first.name} and {other.name} are different metrics: compare metrics of one name")
        if differing := differences(first.fingerprint, other.fingerprint):
            raise UserError(f"{first.name} was measured with different settings ({differing}): use the same settings")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The keys in which two fingerprints differ, with both values; empty if there are none."""
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    return "; ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys)


def table(models: Mapping[str, Sequence[Metric]]) -> list[list[str]]:
    """Metrics by model as rows of text; the first row is the heading."""
    names = list(dict.fromkeys(metric.name for metrics in models.values() for metric in metrics))
    by_name = {name: [m for metrics in models.values() for m in metrics if m.name == name] for name in names}
    for of_one_name in by_name.values():
        check_comparable(of_one_name)
    rows = [["", *(f"{name} ({'↓' if by_name[name][0].better == 'lower' else '↑'})" for name in names)]]
    for model, metrics in models.items():
        values = {metric.name: str(metric) for metric in metrics}
        rows.append([model, *(values.get(name, "") for name in names)])
    return rows
