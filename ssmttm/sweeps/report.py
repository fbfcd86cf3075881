"""`ssmttm sweep report DIR`: the sweep as Markdown, CSV and a page, from what its jobs have recorded so far."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.metric import markdown
from ssmttm.files import atomic_write, write_text
from ssmttm.reports.html import Picture, Section, Table, Text, write_page
from ssmttm.sweeps import plots
from ssmttm.sweeps.collect import SPENT, Group, Run, collect, group
from ssmttm.sweeps.folder import SweepFolder

Rows = list[list[str]]
_EQUAL = {"step": "steps", "samples": "samples", "flops": "FLOPs", "seconds": "seconds"}


def write_report(path: Path) -> list[Path]:
    """Write DIR/report/: report.md, report.html, runs.csv, curves.csv, curves.png, pareto.png.

    Returns:
        What was written.

    Raises:
        UserError: the folder is no sweep's, or no job has recorded a validation yet.
    """
    folder = SweepFolder(path)
    settings, runs = folder.config().sweep, collect(folder)
    groups, metric = group(runs), settings.metric
    if not groups:
        raise UserError(f"{path}: no job has recorded {metric} yet; look again later, or set sweep.metric")
    out = path / "report"
    title = f"Sweep {settings.name}"
    tables = {
        f"{metric}, mean over seeds and 95 % interval": main_table(groups),
        f"against {groups[0].name}: difference at equal spending, paired by seed": paired_table(groups),
        "evaluation": figures_table(groups),
        "jobs that are not done": [["job", "status"], *([r.job.name, r.status] for r in runs if r.status != "done")],
    }
    tables = {name: rows for name, rows in tables.items() if len(rows) > 1}
    told = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).items())
    pictures = {"curves.png": plots.curves(groups, metric), "pareto.png": plots.pareto(groups, metric)}
    texts = {
        "report.md": _markdown(title, f"{len(runs)} jobs: {told}.", tables, list(pictures)),
        "runs.csv": _csv(runs_table(runs)),
        "curves.csv": _csv(curves_table(runs)),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    for name, picture in pictures.items():
        with atomic_write(out / name) as aside:
            aside.write_bytes(picture)
    sections = [Section(name, [Picture(picture, name)]) for name, picture in pictures.items()]
    sections += [Section(name, [Table(rows[0], rows[1:])]) for name, rows in tables.items()]
    sections.append(Section("Again", [Text(f"ssmttm sweep report {path}", code=True)]))
    write_page(out / "report.html", title, sections, lead=told)
    return [out / name for name in ("report.html", "report.md", "runs.csv", "curves.csv", *pictures)]


def main_table(groups: Sequence[Group]) -> Rows:
    """Parameters, what was spent, the last value, and the value where every group has spent the same."""
    amounts = {kind: min(group.furthest(kind) for group in groups) for kind in ("step", "flops", "seconds")}
    equal = [f"at {amount:.4g} {_EQUAL[kind]}" for kind, amount in amounts.items()]
    rows = [["", "seeds", "parameters", "steps", "FLOPs", "seconds a step", "at the end", *equal]]
    for member in groups:
        pace = float(np.median([run.spent["seconds"][-1] / run.spent["step"][-1] for run in member.runs]))
        sizes = [f"{member.parameters:,}", f"{member.furthest('step'):.0f}", f"{member.furthest('flops'):.3g}"]
        last = np.array([run.loss[-1] for run in member.runs])
        cells = [interval(values) for values in (last, *(member.at(kind, amounts[kind]) for kind in amounts))]
        rows.append([member.name, str(len(member.runs)), *sizes, f"{pace:.3g}", *cells])
    return rows


def paired_table(groups: Sequence[Group]) -> Rows:
    """How much each group differs from the first, seed by seed, where both have spent the same.

    Empty where a run had no validation by then, or no seed is in both.
    """
    rows = [["", *(f"at equal {_EQUAL[kind]}" for kind in SPENT if kind != "samples")]]
    first = groups[0]
    for member in groups[1:]:
        cells = []
        for kind in ("step", "flops", "seconds"):
            amount = min(first.furthest(kind), member.furthest(kind))
            by_seed = [{run.job.labels["seed"]: run.at(kind, amount) for run in g.runs} for g in (first, member)]
            shared = sorted(by_seed[0].keys() & by_seed[1].keys())
            cells.append(interval(np.array([by_seed[1][seed] - by_seed[0][seed] for seed in shared]), sign=True))
        rows.append([member.name, *cells])
    return rows


def figures_table(groups: Sequence[Group]) -> Rows:
    """What `ssmttm evaluate` measured, mean over seeds."""
    names = sorted({name for member in groups for run in member.runs for name in run.metrics})
    if not names:
        return []
    rows = [["", *names]]
    for member in groups:
        values = [[run.metrics[name] for run in member.runs if name in run.metrics] for name in names]
        rows.append([member.name, *(interval(np.array(found)) if found else "" for found in values)])
    return rows


def runs_table(runs: Sequence[Run]) -> Rows:
    """One row a job."""
    labels = list(dict.fromkeys(label for run in runs for label in run.job.labels))
    metrics = sorted({name for run in runs for name in run.metrics})
    rows = [["job", *labels, "status", "parameters", *SPENT, "metric", *metrics]]
    for run in runs:
        last = [repr(float(run.spent[kind][-1])) if len(run.loss) else "" for kind in SPENT]
        value = repr(float(run.loss[-1])) if len(run.loss) else ""
        where = [run.job.labels.get(label, "") for label in labels]
        found = [repr(run.metrics[name]) if name in run.metrics else "" for name in metrics]
        rows.append([run.job.name, *where, run.status, str(run.parameters or ""), *last, value, *found])
    return rows


def curves_table(runs: Sequence[Run]) -> Rows:
    """One row a validation."""
    rows = [["job", *SPENT, "metric"]]
    for run in runs:
        for i, value in enumerate(run.loss):
            rows.append([run.job.name, *(repr(float(run.spent[kind][i])) for kind in SPENT), repr(float(value))])
    return rows


def interval(values: np.ndarray, sign: bool = False) -> str:
    """Mean and half the width of its 95 % interval (Student's t), which one value has not; "" for none, or a NaN."""
    if len(values) == 0 or np.isnan(values).any():
        return ""
    mean = f"{values.mean():+.4f}" if sign else f"{values.mean():.4f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {half:.4f}"


def _markdown(title: str, lead: str, tables: dict[str, Rows], pictures: Sequence[str]) -> str:
    parts = [f"# {title}", lead, *(f"![{name}]({name})" for name in pictures)]
    parts += [f"## {name}\n\n{markdown(rows)}" for name, rows in tables.items()]
    return "\n\n".join(parts) + "\n"


def _csv(rows: Rows) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()
