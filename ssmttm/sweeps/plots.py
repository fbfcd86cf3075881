"""A sweep's pictures: the metric against what was spent, with bands over seeds, and Pareto fronts."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmttm.sweeps.collect import SPENT, Group

AXES = {"step": "steps", "samples": "samples seen", "flops": "training FLOPs", "seconds": "seconds of training"}
_POINTS = 200  # of a drawn line


def curves(groups: Sequence[Group], metric: str) -> bytes:
    """The metric against each of SPENT: the mean over seeds, and a band from the best to the worst. PNG."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, kind in zip(figure.subplots(2, 2).flat, SPENT, strict=True):
        for group in groups:
            first = max(float(run.spent[kind][0]) for run in group.runs)
            along = np.linspace(first, group.furthest(kind), _POINTS)
            lines = np.array([[run.at(kind, x) for x in along] for run in group.runs])  # [seeds, points]
            (line,) = axes.plot(along, lines.mean(0), label=f"{group.name} ({len(group.runs)})")
            axes.fill_between(along, lines.min(0), lines.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
        _name(axes, AXES[kind], metric)
    axes.legend(fontsize=8, title="seeds in brackets", title_fontsize=8)
    return _png(figure)


def pareto(groups: Sequence[Group], metric: str) -> bytes:
    """The last value of the metric against parameters, FLOPs and seconds; a line joins what nothing else beats. PNG."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    costs = {"parameters": [float(group.parameters) for group in groups]}
    costs |= {AXES[kind]: [group.furthest(kind) for group in groups] for kind in ("flops", "seconds")}
    values = [float(np.mean([run.loss[-1] for run in group.runs])) for group in groups]
    for axes, (name, cost) in zip(figure.subplots(1, 3), costs.items(), strict=True):
        for group, x, y in zip(groups, cost, values, strict=True):
            axes.plot([x] * len(group.runs), [run.loss[-1] for run in group.runs], ".", color="0.7", markersize=4)
            axes.plot(x, y, "o")
            axes.annotate(group.name, (x, y), (4, 4), textcoords="offset points", fontsize=7)
        best = front(list(zip(cost, values, strict=True)))
        axes.plot([cost[i] for i in best], [values[i] for i in best], "--", color="0.5", linewidth=1, zorder=0)
        if min(cost) > 0:
            axes.set_xscale("log")
        _name(axes, name, metric)
    return _png(figure)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, value) points no other beats in one without losing in the other, by cost; lower is better."""
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not best or points[i][1] < points[best[-1]][1]:
            best.append(i)
    return best


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
