"""`ssmttm sweep report DIR`: a sweep as Markdown, CSV and an HTML page, from what its jobs have recorded so far."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from ssmttm.errors import UserError
from ssmttm.files import atomic_write, write_text
from ssmttm.reports.charts import Chart
from ssmttm.reports.page import data_uri, write_page
from ssmttm.reports.tables import Section, markdown_report
from ssmttm.sweeps import plots
from ssmttm.sweeps.collect import SPENT, Group, Run, collect, group
from ssmttm.sweeps.folder import SweepFolder

Rows = list[list[str]]
_EQUAL = {"step": "steps", "flops": "FLOPs", "seconds": "seconds"}


def write_report(path: Path) -> list[Path]:
    """Write DIR/report/: report.md, report.html, runs.csv, curves.csv, curves.png, pareto.png.

    Returns:
        The files.

    Raises:
        UserError: the folder is no sweep's, or no job has recorded a validation yet.
    """
    folder = SweepFolder(path)
    settings, runs = folder.config().sweep, collect(folder)
    groups, metric = group(runs), settings.metric
    if not groups:
        raise UserError(f"{path}: no job has recorded {metric} yet; try again later, or set sweep.metric")
    out = path / "report"
    title = f"Sweep {settings.name}"
    tables = {
        f"{metric}, mean over seeds and 95 % interval": main_table(groups),
        f"Difference to {groups[0].name} at equal cost, paired by seed": paired_table(groups),
        "Evaluation": metrics_table(groups),
        "Unfinished jobs": [["job", "status"], *([r.job.name, r.status] for r in runs if r.status != "done")],
    }
    statuses = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).items())
    summary = Section(text=f"{len(runs)} jobs: {statuses}.")
    sections = [Section(name, rows=rows) for name, rows in tables.items() if len(rows) > 1]
    pictures = {"curves.png": plots.curves(groups, metric), "pareto.png": plots.pareto(groups, metric)}
    links = Section(text="\n\n".join(f"![{name}]({name})" for name in pictures))
    texts = {
        "report.md": markdown_report(title, [summary, links, *sections]),
        "runs.csv": _csv(runs_table(runs)),
        "curves.csv": _csv(curves_table(runs)),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    for name, picture in pictures.items():
        with atomic_write(out / name) as file:
            file.write_bytes(picture)
    write_page(
        out / "report.html",
        "report.html",
        title=title,
        charts=[Chart(data_uri("image/png", picture), name) for name, picture in pictures.items()],
        sections=[summary, *sections],
        command=f"ssmttm sweep report {path}",
    )
    return [out / name for name in ("report.html", *texts, *pictures)]


def main_table(groups: Sequence[Group]) -> Rows:
    """Parameters, cost, the last value of the metric, and its value at equal cost of all groups."""
    amounts = {kind: min(group.furthest(kind) for group in groups) for kind in _EQUAL}
    equal = [f"at {amount:.4g} {_EQUAL[kind]}" for kind, amount in amounts.items()]
    rows = [["", "seeds", "parameters", "steps", "FLOPs", "seconds per step", "at the end", *equal]]
    for member in groups:
        pace = float(np.median([run.spent["seconds"][-1] / run.spent["step"][-1] for run in member.runs]))
        sizes = [f"{member.parameters:,}", f"{member.furthest('step'):.0f}", f"{member.furthest('flops'):.3g}"]
        last = np.array([run.loss[-1] for run in member.runs])
        cells = [interval(values) for values in (last, *(member.at(kind, amounts[kind]) for kind in amounts))]
        rows.append([member.name, str(len(member.runs)), *sizes, f"{pace:.3g}", *cells])
    return rows


def paired_table(groups: Sequence[Group]) -> Rows:
    """The difference of each group to the first at equal cost, paired by seed.

    Empty where a run had no validation by then, or the groups share no seed.
    """
    rows = [["", *(f"at equal {name}" for name in _EQUAL.values())]]
    first = groups[0]
    for member in groups[1:]:
        cells = []
        for kind in _EQUAL:
            amount = min(first.furthest(kind), member.furthest(kind))
            by_seed = [{run.job.labels["seed"]: run.at(kind, amount) for run in g.runs} for g in (first, member)]
            shared = sorted(by_seed[0].keys() & by_seed[1].keys())
            cells.append(interval(np.array([by_seed[1][seed] - by_seed[0][seed] for seed in shared]), sign=True))
        rows.append([member.name, *cells])
    return rows


def metrics_table(groups: Sequence[Group]) -> Rows:
    """The metrics of `ssmttm evaluate`, mean over seeds."""
    names = sorted({name for member in groups for run in member.runs for name in run.metrics})
    if not names:
        return []
    rows = [["", *names]]
    for member in groups:
        values = [[run.metrics[name] for run in member.runs if name in run.metrics] for name in names]
        rows.append([member.name, *(interval(np.array(found)) for found in values)])
    return rows


def runs_table(runs: Sequence[Run]) -> Rows:
    """One row per job."""
    labels = list(dict.fromkeys(label for run in runs for label in run.job.labels))
    metrics = sorted({name for run in runs for name in run.metrics})
    rows = [["job", *labels, "status", "parameters", *SPENT, "metric", *metrics]]
    for run in runs:
        last = [repr(float(run.spent[kind][-1])) if len(run.loss) else "" for kind in SPENT]
        value = repr(float(run.loss[-1])) if len(run.loss) else ""
        point = [run.job.labels.get(label, "") for label in labels]
        found = [repr(run.metrics[name]) if name in run.metrics else "" for name in metrics]
        rows.append([run.job.name, *point, run.status, str(run.parameters or ""), *last, value, *found])
    return rows


def curves_table(runs: Sequence[Run]) -> Rows:
    """One row per validation."""
    rows = [["job", *SPENT, "metric"]]
    for run in runs:
        for i, value in enumerate(run.loss):
            rows.append([run.job.name, *(repr(float(run.spent[kind][i])) for kind in SPENT), repr(float(value))])
    return rows


def interval(values: np.ndarray, sign: bool = False) -> str:
    """Mean and half width of its 95 % interval (Student's t); the mean alone for one value, "" for none or a NaN."""
    if len(values) == 0 or np.isnan(values).any():
        return ""
    mean = f"{values.mean():+.4f}" if sign else f"{values.mean():.4f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {half:.4f}"


def _csv(rows: Rows) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()
