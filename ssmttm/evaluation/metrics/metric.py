"""Figures that know what they were measured with, and refuse to be compared with figures measured otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ssmttm.errors import UserError

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One measured value.

    Attributes:
        name: with the embedder's, such as fad_tiny.
        low, high: its 95 % interval.
        better: whether lower or higher values are.
        fingerprint: everything that the value depends on besides the model: embedder and hash, rate, window, clip
            length, numbers of clips, seed, decoding, hashes of prompts and reference.
    """

    name: str
    value: float
    low: float
    high: float
    better: Direction
    fingerprint: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def compare(a: Metric, b: Metric) -> str:
    """Which of two figures of one name is better, if either, in words, and whether their intervals overlap.

    Raises:
        UserError: they measure different things, or were measured differently; says in what.
    """
    check_comparable([a, b])
    if a.value == b.value:
        return f"{a.name}: both are {a.value:.4g}"
    better, worse = (a, b) if (a.value < b.value) == (a.better == "lower") else (b, a)
    apart = a.high < b.low or b.high < a.low
    which = "the first" if better is a else "the second"
    how = "their intervals are apart" if apart else "their intervals overlap"
    return f"{a.name}: {which} is better ({better.value:.4g} against {worse.value:.4g}); {how}"


def check_comparable(metrics: Sequence[Metric]) -> None:
    """Raises UserError unless all figures have one name and one fingerprint; says where they differ."""
    first = metrics[0]
    for other in metrics[1:]:
        if other.name != first.name:
            raise UserError(f"{first.name} and {other.name} measure different things: compare figures of one name")
        if differing := differences(first.fingerprint, other.fingerprint):
            raise UserError(f"{first.name}: these figures were measured differently ({differing}): measure them alike")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Where two fingerprints differ, in words; empty if nowhere."""
    keys = [key for key in (*a, *(key for key in b if key not in a)) if a.get(key) != b.get(key)]
    return "; ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys)


def table(models: Mapping[str, Sequence[Metric]]) -> list[list[str]]:
    """Figures by model as rows of text, the first one the heading.

    Raises:
        UserError: figures of one name were measured differently.
    """
    names = list(dict.fromkeys(metric.name for metrics in models.values() for metric in metrics))
    by_name = {name: [f for metrics in models.values() for f in metrics if f.name == name] for name in names}
    for metrics in by_name.values():
        check_comparable(metrics)
    rows = [["", *(f"{name} ({'↓' if by_name[name][0].better == 'lower' else '↑'})" for name in names)]]
    for model, metrics in models.items():
        found = {metric.name: str(metric) for metric in metrics}
        rows.append([model, *(found.get(name, "") for name in names)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table in Markdown, the first one its heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
