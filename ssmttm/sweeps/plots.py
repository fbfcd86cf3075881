"""Charts of a sweep: the metric against its cost, with bands over seeds, and Pareto fronts."""

from collections.abc import Sequence

import numpy as np

from ssmttm.reports import charts
from ssmttm.sweeps.collect import SPENT, Group

AXES = {"step": "steps", "samples": "samples", "flops": "training FLOPs", "seconds": "seconds of training"}
_POINTS = 200  # of a line


def curves(groups: Sequence[Group], metric: str) -> bytes:
    """The metric against each of SPENT: the mean over seeds, and a band from the best to the worst. PNG."""
    with charts.style():
        figure = charts.new_figure(10, 7)
        for axes, kind in zip(figure.subplots(2, 2).flat, SPENT, strict=True):
            for group in groups:
                first = max(float(run.spent[kind][0]) for run in group.runs)
                amounts = np.linspace(first, group.furthest(kind), _POINTS)
                lines = np.array([[run.at(kind, x) for x in amounts] for run in group.runs])  # [seeds, points]
                (line,) = axes.plot(amounts, lines.mean(0), label=f"{group.name} ({len(group.runs)})")
                axes.fill_between(amounts, lines.min(0), lines.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
            axes.set(xlabel=AXES[kind], ylabel=metric)
        axes.legend(title="number of seeds in brackets")
        return charts.save(figure, "png")


def pareto(groups: Sequence[Group], metric: str) -> bytes:
    """The last value of the metric against parameters, FLOPs and seconds; a line joins the Pareto front. PNG."""
    costs = {"parameters": [float(group.parameters) for group in groups]}
    costs |= {AXES[kind]: [group.furthest(kind) for group in groups] for kind in ("flops", "seconds")}
    values = [float(np.mean([run.loss[-1] for run in group.runs])) for group in groups]
    with charts.style():
        figure = charts.new_figure(11, 3.6)
        for axes, (name, cost) in zip(figure.subplots(1, 3), costs.items(), strict=True):
            for group, x, y in zip(groups, cost, values, strict=True):
                axes.plot([x] * len(group.runs), [run.loss[-1] for run in group.runs], ".", color="0.7", markersize=4)
                axes.plot(x, y, "o")
                axes.annotate(group.name, (x, y), (4, 4), textcoords="offset points", fontsize=7)
            best = front(list(zip(cost, values, strict=True)))
            axes.plot([cost[i] for i in best], [values[i] for i in best], "--", color="0.5", linewidth=1, zorder=0)
            if min(cost) > 0:
                axes.set_xscale("log")
            axes.set(xlabel=name, ylabel=metric)
        return charts.save(figure, "png")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points on the Pareto front, by cost; lower is better."""
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not best or points[i][1] < points[best[-1]][1]:
            best.append(i)
    return best
