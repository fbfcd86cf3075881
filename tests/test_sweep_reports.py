"""Reports of sweeps: comparison at equal cost, intervals, unfinished sweeps."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from small_sweeps import RATES, settings, use_fake_training

from ssmttm.cli.main import main
from ssmttm.errors import UserError, run_cli
from ssmttm.sweeps import plots, report, training_job
from ssmttm.sweeps.collect import SPENT, Group, Run, collect, group
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job, expand
from ssmttm.sweeps.run import run_sweep


@pytest.fixture
def fake(monkeypatch):
    use_fake_training(monkeypatch)


def fake_run(name, seed, losses, pace, parameters=1000, metrics=None):
    steps = np.arange(1, len(losses) + 1, dtype=float)
    spent = {"step": steps, "samples": 8 * steps, "flops": 1e9 * steps, "seconds": pace * steps}
    job = Job(f"{name}-{seed}", {"backbone": name, "seed": str(seed)}, [])
    return Run(job, "done", parameters, spent, np.array(losses), metrics or {})


@pytest.fixture
def groups():
    runs = [fake_run("fast", s, [4.0 + s, 3.0 + s, 2.0 + s], pace=1.0) for s in (0, 1, 2)]
    runs += [fake_run("slow", s, [3.5 + s, 2.5 + s, 1.5 + s], pace=2.0, metrics={"fad": 5.0 + s}) for s in (0, 1, 2)]
    return group(runs)


def test_report_compares_at_equal_cost_seed_by_seed(groups):
    """At equal steps `slow` is 0.5 better; at equal seconds (3, its step 1.5) it is 1.0 worse."""
    rows = report.paired_table(groups)
    assert rows[1] == ["slow", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000", "+1.0000 ± 0.0000"]


def test_report_main_table(groups):
    rows = report.main_table(groups)
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert table["fast"]["at the end"].startswith("3.0000 ± ") and table["slow"]["seconds per step"] == "2"
    assert table["slow"]["at 3 seconds"].startswith("4.0000")
    assert report.metrics_table(groups)[2][1].startswith("6.0000")


def test_report_interval_is_students_t(groups):
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    mean, half = map(float, report.interval(values).split(" ± "))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=2e-4)
    assert report.interval(np.array([1.0])) == "1.0000"


def test_run_interpolates_between_validations(groups):
    run = groups[0].runs[0]
    assert run.at("step", 1.5) == 3.5 and run.at("seconds", 2.25) == 2.75 and groups[1].furthest("seconds") == 6


def test_run_is_nan_before_its_first_validation(groups):
    """A slow model's first validation does not count at an earlier time."""
    late = Group("late", [fake_run("late", seed, [1.0, 0.5], pace=50.0) for seed in (0, 1, 2)])
    rows = report.paired_table([groups[0], late])
    assert rows[1][0] == "late" and rows[1][3] == "" and rows[1][1].startswith("-")
    other = Group("other", [fake_run("other", 7, [1.0, 0.5], pace=1.0)])
    assert report.paired_table([groups[0], other])[1][1:] == ["", "", ""]


def test_collect_puts_points_outside_the_grid_last(tmp_path, fake):
    """The first group, which the others are compared with, stays the grid's first."""
    run_sweep(settings(tmp_path, {"optim.lr": [0.001, 0.01]}))
    folder = run_sweep(settings(tmp_path, {"optim.lr": [0.1, 0.01]}))
    assert [run.job.labels["optim.lr"] for run in collect(folder)] == ["0.1", "0.01", "0.001"]


def test_last_step_is_read_from_the_end_of_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert training_job.last_step(tmp_path) == 0
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(5000)) + '{"step": 9')
    assert training_job.last_step(tmp_path) == 4999


def test_pareto_front_is_not_dominated():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 12, (60, 2)).tolist()]

    def dominated(a):
        return any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)

    front = [points[i] for i in plots.front(points)]
    assert front == sorted({point for point in points if not dominated(point)})


def test_report_of_an_unfinished_sweep(tmp_path, fake):
    folder = run_sweep(settings(tmp_path, RATES, seeds=[0, 1]))
    (folder.job_folder("0.01-seed1") / "done.json").unlink()
    written = report.write_report(folder.path)
    assert {path.name for path in written} == {
        "report.html", "report.md", "runs.csv", "curves.csv", "curves.png", "pareto.png",
    }  # fmt: skip
    rows = list(csv.DictReader((folder.path / "report" / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["done", "done", "done", "unfinished"]
    curves = list(csv.DictReader((folder.path / "report" / "curves.csv").open()))
    assert len(curves) == 20 and set(curves[0]) == {"job", *SPENT, "metric"}
    text = (folder.path / "report" / "report.md").read_text()
    assert "3 done, 1 unfinished" in text and "| 0.01-seed1 | unfinished |" in text
    page = (folder.path / "report" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_report_of_another_folder_is_a_clear_error(tmp_path, make, capsys):
    make(tmp_path / "x")
    assert run_cli(lambda: main(["sweep", "report", str(tmp_path / "x")])) == 2
    assert "not the folder of a sweep" in capsys.readouterr().err


def test_report_before_the_first_validation_is_a_clear_error(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.write_config(settings(tmp_path, RATES))
    folder.add_jobs(expand(settings(tmp_path, RATES).sweep))
    with pytest.raises(UserError, match="valid/loss yet"):
        report.write_report(tmp_path)


def test_report_has_no_interval_for_one_seed():
    rows = report.main_table([Group("a", [fake_run("a", 0, [2.0, 1.0], 1.0)])])
    assert rows[1][6:] == ["1.0000"] * 4
