"""Sweeps: expansion of a grid, jobs as processes."""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from small_stores import write_codes_store
from small_sweeps import HERE, RATES, debug_settings, lines, settings, starts, use_fake_training

from ssmttm import config
from ssmttm.cli.main import main
from ssmttm.errors import UserError
from ssmttm.files import is_locked
from ssmttm.launch import job as launch_job
from ssmttm.models.size import count_parameters, size_of
from ssmttm.sweeps import launchers
from ssmttm.sweeps.collect import collect
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import expand
from ssmttm.sweeps.run import run_sweep
from ssmttm.sweeps.training_job import TrainingJob


@pytest.fixture
def fake(monkeypatch):
    use_fake_training(monkeypatch)


# --- expansion ------------------------------------------------------------------------------------------------------


def test_grid_expands_to_every_combination_with_every_seed(tmp_path):
    grid = {"optim.lr": [0.001, 0.01], "mixer": {"ssd": ["model.layers=mamba2"], "s4d": ["model.layers=s4d"]}}
    jobs = expand(settings(tmp_path, grid, seeds=[0, 7]).sweep)
    assert len(jobs) == len({job.name for job in jobs}) == 8
    points = {(job.labels["optim.lr"], job.labels["mixer"], job.labels["seed"]) for job in jobs}
    assert points == set(itertools.product(("0.001", "0.01"), ("ssd", "s4d"), ("0", "7")))
    job = next(job for job in jobs if job.name == "0.01-s4d-seed7")
    composed = config.load(*job.overrides)
    assert (composed.optim.lr, composed.model.layers, composed.seed, composed.train.steps) == (0.01, "s4d", 7, 5)


def test_grid_axis_may_change_the_experiment(tmp_path):
    grid = {"kind": {"a": ["experiment=debug"], "b": ["experiment=tiny", "model.n_layers=1"]}}
    composed = [config.load(*job.overrides) for job in expand(settings(tmp_path, grid).sweep)]
    assert [c.run_dir for c in composed] == ["runs/debug", "runs/tiny"] and composed[1].model.n_layers == 1


def test_grid_axis_may_contain_null(tmp_path):
    jobs = expand(settings(tmp_path, {"init": [None, "runs/x"]}).sweep)
    assert [config.load(*job.overrides).init for job in jobs] == [None, "runs/x"] and jobs[0].name == "null-seed0"


def test_match_fits_every_model_to_one_size(tmp_path):
    grid = {"model.layers": ["mamba2", "attention"]}
    sweep = settings(tmp_path, grid, experiment="tiny", match={"parameters": "8M"}).sweep
    sizes = [count_parameters(config.load(*job.overrides).model) for job in expand(sweep)]
    assert all(abs(size / 8e6 - 1) < 0.06 for size in sizes) and sizes[0] != sizes[1]


def test_budget_of_flops_gives_larger_models_fewer_steps(tmp_path):
    budget = {"steps": None, "flops": 1e13}
    sweep = settings(tmp_path, {"model.n_layers": [2, 4]}, budget=budget).sweep
    for job in expand(sweep):
        c = config.load(*job.overrides)
        spent = 3 * size_of(c.model, c.data.frames).forward * c.data.frames * c.data.batch_size * c.train.steps
        assert spent == pytest.approx(1e13, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": None}, "sweep=NAME"),
        ({"experiment": "debig"}, "experiment=debug"),
        ({"budget": {"steps": 3, "flops": 1e9}}, "keep one"),
        ({"budget": {"steps": 0}}, "more than 0"),
        ({"seeds": []}, "seeds is empty"),
        ({"match": {"vary": "d_model"}}, "no parameters"),
        ({"grid": {"optim.lr": 3}}, "must be a list of values"),
        ({"grid": {"optim.lr": []}}, "must be a list of values"),
        ({"grid": {"optim.rate": [1]}}, "optim.rate"),
        ({"grid": {"a": {"x y": ["seed=1"], "x/y": ["seed=2"]}}}, "both named"),
    ],
)
def test_invalid_sweep_is_one_clear_error(tmp_path, change, message):
    sweep = settings(tmp_path, {}).sweep
    OmegaConf.update(sweep, "grid", {})
    for key, value in change.items():
        OmegaConf.update(sweep, key, value)
    with pytest.raises(UserError) as caught:
        expand(sweep)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", config.names("sweep"))
def test_every_sweep_composes_and_expands(name):
    sweep = config.load(f"sweep={name}", root="sweep").sweep
    assert sweep.name == name
    jobs = expand(sweep)
    assert len(jobs) >= 2 and len({tuple(job.overrides) for job in jobs}) == len(jobs)


def test_docs_examples_are_valid_sweeps():
    page = (HERE.parent / "docs" / "sweeps.md").read_text()
    example, search = (OmegaConf.create(block.split("```")[0]) for block in page.split("```yaml\n")[1:])
    composed = config.load(root="sweep").sweep
    OmegaConf.set_struct(composed, False)  # an axis may have any name
    jobs = expand(OmegaConf.merge(composed, example))
    assert len(jobs) == 12 and example.keys() <= composed.keys() and search.keys() <= composed.keys()
    for name in config.names("sweep"):
        assert f"`{name}`" in page, name


# --- running --------------------------------------------------------------------------------------------------------


def test_jobs_run_once_and_are_skipped_afterwards(tmp_path, fake, capsys):
    sweep_settings = settings(tmp_path, RATES, seeds=[0, 1])
    folder = run_sweep(sweep_settings)
    names = [job.name for job in folder.jobs()]
    assert len(names) == 4 and all(folder.is_done(name) and starts(folder, name) == 1 for name in names)
    run_sweep(sweep_settings)
    assert all(starts(folder, name) == 1 for name in names)
    assert "4 jobs, 4 of them done" in capsys.readouterr().out
    run_sweep(settings(tmp_path, {"optim.lr": [0.001, 0.01, 0.1]}, seeds=[0, 1]))  # a grid may grow
    assert len(folder.jobs()) == 6 and all(starts(folder, job.name) == 1 for job in folder.jobs())


def test_progress_is_written_when_a_step_is_new(tmp_path, fake, capsys):
    """The steps are read fifty times a second; a log must not grow by a line each time."""
    run_sweep(settings(tmp_path, RATES, steps=3))
    redrawn = [part for part in capsys.readouterr().err.split("\r") if "seed0" in part]
    assert 1 <= len(redrawn) <= 2 * (3 + 2)  # of two jobs: at most step 0, each step, and the end of the other job


def test_jobs_run_in_parallel_up_to_the_limit(tmp_path, fake):
    def together(parallel, steps):
        folder = run_sweep(settings(tmp_path / str(parallel), RATES, steps=steps, parallel=parallel))
        spans = []
        for job in folder.jobs():
            run = folder.job_folder(job.name) / "run"
            spans.append((run.joinpath("starts").stat().st_mtime, run.joinpath("metrics.jsonl").stat().st_mtime))
        (_, end), (start, _) = sorted(spans)
        return start < end

    assert together(2, steps=100) and not together(1, steps=5)


def test_failed_job_is_reported_and_the_others_finish(tmp_path, fake, capsys):
    axes = {"train.log_every": [1, 666, 667, 668]}
    with pytest.raises(UserError, match=r"2 jobs failed \(666-seed0, 667-seed0\)"):
        run_sweep(settings(tmp_path, axes))
    folder = SweepFolder(tmp_path / "sweep")
    assert [starts(folder, f"{kind}-seed0") for kind in axes["train.log_every"]] == [1, 2, 1, 2]
    assert folder.is_done("1-seed0") and folder.is_done("668-seed0")
    assert {run.job.name: run.status for run in collect(folder)} == {
        "1-seed0": "done", "666-seed0": "failed", "667-seed0": "failed", "668-seed0": "done",
    }  # fmt: skip
    assert "it crashed on purpose" in capsys.readouterr().err
    with pytest.raises(UserError, match="failed"):
        run_sweep(settings(tmp_path, axes))
    assert [starts(folder, f"{kind}-seed0") for kind in axes["train.log_every"]] == [1, 4, 2, 2]


def test_job_with_other_settings_is_rejected(tmp_path, fake):
    run_sweep(settings(tmp_path, RATES))
    with pytest.raises(UserError, match="other settings"):
        run_sweep(settings(tmp_path, RATES, steps=6))


def test_sweep_with_another_store_is_rejected(tmp_path, fake):
    """Models trained on different corpora cannot be compared in one table."""
    run_sweep(settings(tmp_path, RATES))
    with pytest.raises(UserError, match=r"started with store=.*none"):
        run_sweep(OmegaConf.merge(settings(tmp_path, RATES), {"store": "other"}))


def test_evaluation_added_later_runs_without_training_again(tmp_path, fake, monkeypatch):
    command = TrainingJob.command

    def evaluating(self, stage):
        if stage != "evaluation":
            return command(self, stage)
        code = f"import json, pathlib as p; f = p.Path({str(self.folder / stage)!r}); f.mkdir(exist_ok=True)"
        metrics = json.dumps({"metrics": [{"name": "fad_tiny", "value": len(self._evaluate)}]})
        return [sys.executable, "-c", f"{code}; (f / 'metrics.json').write_text({metrics!r})"]

    monkeypatch.setattr(TrainingJob, "command", evaluating)
    folder = run_sweep(settings(tmp_path, RATES))
    assert all(not run.metrics for run in collect(folder))
    for evaluate in (["eval=builtin"], ["eval=builtin"], ["eval=builtin", "n=64"]):
        run_sweep(settings(tmp_path, RATES, evaluate=evaluate))
        assert [run.metrics for run in collect(folder)] == [{"fad_tiny": len(evaluate)}] * 2
        log = (folder.job_folder("0.001-seed0") / "log.txt").read_text()
        assert log.count("'metrics.json'") == len(evaluate) and len(lines(folder, "0.001-seed0")) == 10
    run_sweep(settings(tmp_path, RATES))
    assert (folder.job_folder("0.001-seed0") / "log.txt").read_text() == log


def test_error_in_a_sweep_stops_its_trainings(tmp_path, fake):
    """Such as an error in the callback of a search."""
    sweep_settings = settings(tmp_path, {"train.steps": [5, 500]}, budget={"steps": None})
    folder, jobs = SweepFolder(tmp_path / "sweep"), expand(sweep_settings.sweep)
    folder.add_jobs(jobs)

    def fail(job, outcome):
        raise UserError(f"no use for {job.name}, {outcome}")

    with pytest.raises(UserError, match="no use for 5-seed0, done"):
        launchers.run_local(folder, jobs, sweep_settings, 2, fail)
    while is_locked(folder.job_folder("500-seed0") / "run"):
        time.sleep(0.02)
    assert 0 < len(lines(folder, "500-seed0")) < 1000


def test_sweep_without_store_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="store"):
        run_sweep(OmegaConf.merge(settings(tmp_path, RATES), {"store": None}))


def test_budget_of_seconds_times_the_first_steps(tmp_path, fake):
    folder = run_sweep(settings(tmp_path, RATES, budget={"steps": None, "seconds": 0.5}))
    assert [run.spent["step"][-1] for run in collect(folder)] == [25, 25]  # of 20 ms each


# --- debug trainings -------------------------------------------------------------------------------------------------


def test_sweep_of_debug_trainings_and_its_report(tmp_path, capsys):
    folder = run_sweep(debug_settings(tmp_path, write_codes_store(tmp_path / "a store, with a comma")))
    runs = collect(folder)
    assert [run.status for run in runs] == ["done", "done"] and all(run.parameters > 1000 for run in runs)
    for run in runs:
        c = config.load(*run.job.overrides)
        assert run.spent["step"].tolist() == [2, 4] and run.spent["samples"].tolist() == [8, 16]
        assert run.parameters == count_parameters(c.model) and np.all(np.diff(run.spent["flops"]) > 0)
    assert main(["sweep", "report", str(folder.path)]) == 0
    for path in capsys.readouterr().out.split():
        if path.startswith("/") and "." in Path(path).name:
            assert Path(path).stat().st_size > 100
    text = (folder.path / "report" / "report.md").read_text()
    assert "mamba2" in text and "attention" in text and f"{runs[0].parameters:,}" in text


def test_user_error_in_a_debug_training_is_shown_and_not_retried(tmp_path, capsys):
    with pytest.raises(UserError, match="2 jobs failed"):
        run_sweep(debug_settings(tmp_path, tmp_path / "nowhere"))
    errors = capsys.readouterr().err
    folder = SweepFolder(tmp_path / "sweep")
    logs = [(folder.job_folder(job.name) / "log.txt").read_text() for job in folder.jobs()]
    assert len(logs) == 2 and all(log.count("$ ") == 1 for log in logs)
    assert errors.count("\nerror: ") == 2 and "nowhere" in errors


def test_accelerate_is_used_for_several_processes_only():
    assert launch_job.train_command(None, 1) == [sys.executable, str(launch_job.TRAIN)]
    file = HERE.parent / "configs" / "accelerate" / "cpu2.yaml"
    assert "--main_process_port=7" in launch_job.train_command(str(file), 7)
    with pytest.raises(UserError, match="configs/accelerate"):
        launch_job.train_command("nowhere.yaml", 1)
