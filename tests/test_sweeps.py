"""Sweeps: expansion of a grid, jobs as processes, kills at random times, searches, reports."""

import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from omegaconf import OmegaConf
from scipy import stats
from small_stores import CODEBOOK_SIZE, FRAMES, N_CODEBOOKS, TEXT_DIM, write_codes_store

from ssmttm import config
from ssmttm.cli.main import main
from ssmttm.errors import Preempted, UserError, run_cli
from ssmttm.files import is_locked
from ssmttm.launch import job as launch_job
from ssmttm.launch.job import CommandJob
from ssmttm.models.size import count_parameters, size_of
from ssmttm.sweeps import launchers, plots, report, training_job
from ssmttm.sweeps.collect import SPENT, Group, Run, collect, group
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job, expand
from ssmttm.sweeps.run import run_sweep
from ssmttm.sweeps.training_job import TrainingJob

HERE = Path(__file__).parent
FAKE = HERE / "fake_train.py"


def settings(tmp_path, grid, steps=5, parallel=2, **more):
    """A sweep of debug trainings, composed as by the command."""
    composed = config.load("launcher=local", root="sweep")
    OmegaConf.set_struct(composed, False)
    sweep = {"name": "s", "experiment": "debug", "grid": grid, "budget": {"steps": steps}, **more}
    changes = {"store": "none", "out": str(tmp_path / "sweep"), "launcher": {"parallel": parallel}, "sweep": sweep}
    return OmegaConf.merge(composed, changes)


@pytest.fixture
def fake(monkeypatch):
    """Jobs run fake_train.py."""
    monkeypatch.setattr(launch_job, "TRAIN", FAKE)
    monkeypatch.setattr(launch_job, "POLL_SECONDS", 0.02)


def starts(folder, name):
    """How often a job's training was started."""
    return (folder.job_folder(name) / "run" / "starts").read_text().count("start")


RATES = {"optim.lr": [0.001, 0.01]}


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


# --- killed ---------------------------------------------------------------------------------------------------------

SWEEP = """
import sys
from omegaconf import OmegaConf
from ssmttm.errors import run_cli
from ssmttm.launch import job
from ssmttm.sweeps import run
job.TRAIN, job.POLL_SECONDS = sys.argv[1], 0.02
sys.exit(run_cli(lambda: run.run_sweep(OmegaConf.load(sys.argv[2])) and None))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the same sweep of four jobs in a new process."""
    path = tmp_path / "settings.yaml"
    path.write_text(OmegaConf.to_yaml(settings(tmp_path, RATES, steps=30, seeds=[0, 1])))
    return lambda: subprocess.Popen([sys.executable, "-c", SWEEP, str(FAKE), str(path)], stderr=subprocess.DEVNULL)


def lines(folder, name):
    path = folder.job_folder(name) / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def commands(folder):
    """How often the sweep has started a training, as its logs say."""
    return sum(log.read_text().count("$ ") for log in folder.path.glob("jobs/*/log.txt"))


def test_sweep_killed_at_random_times_repeats_no_step(tmp_path, start):
    """With kill -9: each step of each job runs once, and a finished job is never started again."""
    folder, moments = SweepFolder(tmp_path / "sweep"), random.Random(0)
    was_done: dict[str, int] = {}
    kills = 0
    while kills < 4 or not was_done:
        process, logged = start(), commands(folder)
        while process.poll() is None and commands(folder) == logged:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill()
        process.wait()
        kills += 1
        for job in folder.jobs():
            if folder.is_done(job.name):
                was_done.setdefault(job.name, starts(folder, job.name))
    assert start().wait() == 0
    names = [job.name for job in folder.jobs()]
    assert len(names) == 4 and all(map(folder.is_done, names)) and was_done
    assert all(starts(folder, name) == count for name, count in was_done.items())
    for name in names:
        steps = [json.loads(line)["step"] for line in lines(folder, name)]
        assert steps == sorted([*range(1, 31), *range(1, 31)])


def test_sweep_waits_for_a_training_left_by_a_killed_one(tmp_path, start):
    """fake_train.py rejects a locked folder, and the log would show a second start."""
    process, folder = start(), SweepFolder(tmp_path / "sweep")
    while not lines(folder, "0.001-seed0"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert start().wait() == 0
    assert all(folder.is_done(job.name) for job in folder.jobs())
    assert (folder.job_folder("0.001-seed0") / "log.txt").read_text().count("$ ") == 2
    assert len(lines(folder, "0.001-seed0")) == 60


def test_sweep_killed_while_its_jobs_still_import(tmp_path, start, fake, monkeypatch):
    """A training inherits its job's lock, long before it locks its run folder: no second one starts beside it."""
    monkeypatch.setenv("FAKE_IMPORTS", "1.0")
    process, folder = start(), SweepFolder(tmp_path / "sweep")
    while len(list((folder.path / "jobs").glob("*/run"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder.job_folder("0.001-seed0") / "run" / ".lock").exists()
    run_sweep(settings(tmp_path, RATES, steps=30, seeds=[0, 1]))
    assert all(folder.is_done(job.name) and len(lines(folder, job.name)) == 60 for job in folder.jobs())
    assert "another training" not in (folder.job_folder("0.001-seed0") / "log.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_stops_every_job_with_a_checkpoint(tmp_path, start, number, code):
    process, folder = start(), SweepFolder(tmp_path / "sweep")
    while not (lines(folder, "0.001-seed0") and lines(folder, "0.01-seed0")):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == code
    counts = {job.name: len(lines(folder, job.name)) for job in folder.jobs()}
    time.sleep(0.3)
    assert counts == {job.name: len(lines(folder, job.name)) for job in folder.jobs()} and max(counts.values()) < 60
    assert start().wait() == 0 and all(len(lines(folder, name)) == 60 for name in counts)


def test_two_sweeps_in_one_folder_are_rejected(tmp_path, start, fake):
    process, folder = start(), SweepFolder(tmp_path / "sweep")
    while not lines(folder, "0.001-seed0"):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it would otherwise end before a slow machine has composed the second sweep
    with pytest.raises(UserError, match="another sweep"):
        run_sweep(settings(tmp_path, RATES))
    process.send_signal(signal.SIGCONT)
    process.terminate()
    assert process.wait() == 75


# --- Slurm, Ray, Optuna ---------------------------------------------------------------------------------------------


def test_slurm_runs_each_job_as_an_array_task(tmp_path, monkeypatch):
    """A fake sbatch runs every task of the script."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        '#!/bin/bash\nset -e\nscript="${@: -1}"\n'
        "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)\n"
        'for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i bash "$script" >&2; done\necho 1\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(
        f"from ssmttm.launch import job\njob.TRAIN = {str(FAKE)!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{patched}:{HERE.parent}")
    sweep_settings = settings(tmp_path, RATES)
    sweep_settings = OmegaConf.merge(sweep_settings, {"launcher": config.load("launcher=slurm", root="sweep").launcher})
    folder = run_sweep(sweep_settings)
    assert all(folder.is_done(job.name) for job in folder.jobs()) and len(folder.jobs()) == 2
    script = (folder.path / "sweep.sbatch").read_text()
    assert "--array=0-1%8" in script and "--signal=B:USR1@300" in script and "partition" not in script


def test_slurm_submits_nothing_if_all_jobs_are_done(tmp_path, fake, monkeypatch):
    run_sweep(settings(tmp_path, RATES))
    launcher = config.load("launcher=slurm", "launcher.parallel=null", root="sweep").launcher
    monkeypatch.setenv("PATH", "")
    folder = run_sweep(OmegaConf.merge(settings(tmp_path, RATES), {"launcher": launcher}))
    assert not (folder.path / "sweep.sbatch").exists()
    with pytest.raises(UserError, match="sbatch"):
        run_sweep(OmegaConf.merge(settings(tmp_path, {"optim.lr": [0.1]}), {"launcher": launcher}))
    assert "--array=0-0\n" in (folder.path / "sweep.sbatch").read_text()


def test_slurm_script_is_written_without_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    launcher = config.load("launcher=slurm", root="sweep").launcher
    with pytest.raises(UserError, match="sbatch"):
        run_sweep(OmegaConf.merge(settings(tmp_path, RATES), {"launcher": launcher}))
    assert (tmp_path / "sweep" / "sweep.sbatch").is_file()


def test_ray_runs_each_job_as_a_task(tmp_path, request):
    request.addfinalizer(pytest.importorskip("ray", reason="Ray is not installed").shutdown)
    launcher = config.load("launcher=ray", root="sweep").launcher
    store = write_codes_store(tmp_path / "store")
    sweep_settings = OmegaConf.merge(debug_settings(tmp_path, store), {"launcher": launcher})
    folder = run_sweep(sweep_settings)
    assert all(folder.is_done(job.name) for job in folder.jobs())


def test_search_finds_the_better_rate_and_resumes_after_a_stop(tmp_path, fake, monkeypatch, capsys):
    """The loss of fake_train.py is lowest at a rate of 10 ** -2.5."""
    rates = {"low": 1e-5, "high": 1.0, "log": True}
    search = {"trials": 12, "direction": "minimize", "parameters": {"optim.lr": rates}}
    sweep_settings = settings(tmp_path, {}, search=search)
    run = CommandJob.run

    def interrupted(self, *arguments):
        outcome = run(self, *arguments)
        if self.job.labels["trial"] == "trial0004":
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(CommandJob, "run", interrupted)
    with pytest.raises(Preempted):
        run_sweep(sweep_settings)
    monkeypatch.setattr(CommandJob, "run", run)
    folder = run_sweep(sweep_settings)
    assert len(folder.jobs()) == 12 and all(folder.is_done(job.name) for job in folder.jobs())
    losses = [run.loss[-1] for run in collect(folder)]
    assert min(losses) < 0.7 and "best of 12 trials" in capsys.readouterr().out


@pytest.mark.parametrize("params", [0, 1])
def test_search_replaces_a_trial_without_all_parameters(tmp_path, fake, params):
    axes = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "train.log_every": [1, 2]}
    sweep_settings = settings(tmp_path, {}, search={"trials": 4, "parameters": axes})
    (tmp_path / "sweep").mkdir()
    storage = optuna.storages.journal.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep" / "study.log"))
    )
    half = optuna.create_study(storage=storage, study_name="s").ask()
    if params:
        half.suggest_float("optim.lr", 1e-4, 1e-1, log=True)
    folder = run_sweep(sweep_settings)
    assert len(folder.jobs()) == 4 and all(folder.is_done(job.name) for job in folder.jobs())
    assert all(any("log_every" in word for word in job.overrides) for job in folder.jobs())


def search_settings(tmp_path, **overrides):
    """A search of two trials; `overrides` of every trial."""
    search = {"trials": 2, "parameters": {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}}
    words = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return settings(tmp_path, {}, search=search, overrides=words)


@pytest.mark.parametrize("kind", [666, 667])
def test_search_with_failed_trials_fails_and_tries_them_again(tmp_path, fake, monkeypatch, capsys, kind):
    """The cause lies outside, such as a missing file: the same command succeeds after the repair."""
    sweep_settings = search_settings(tmp_path, train__log_every=kind)
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 2 trials failed \(trial0000-seed0, trial0001-seed0\).*run again"):
            run_sweep(sweep_settings)
    repaired = tmp_path / "repaired.py"
    repaired.write_text(FAKE.read_text().replace("666", "0").replace("667", "0"))
    monkeypatch.setattr(launch_job, "TRAIN", repaired)
    folder = run_sweep(sweep_settings)
    assert [job.name for job in folder.jobs()] == ["trial0000-seed0", "trial0001-seed0"]
    assert all(folder.is_done(job.name) and not folder.is_failed(job.name) for job in folder.jobs())
    assert "best of 2 trials" in capsys.readouterr().out
    before = [starts(folder, job.name) for job in folder.jobs()]
    run_sweep(sweep_settings)
    assert [starts(folder, job.name) for job in folder.jobs()] == before


def test_search_whose_trials_all_diverge_is_a_clear_error(tmp_path, fake, monkeypatch):
    diverging = tmp_path / "diverging.py"
    diverging.write_text(FAKE.read_text().replace('"valid/loss": loss', '"valid/loss": math.nan'))
    monkeypatch.setattr(launch_job, "TRAIN", diverging)
    for _ in range(2):
        with pytest.raises(UserError, match="no trial has a finite valid/loss"):
            run_sweep(search_settings(tmp_path))
    assert len(SweepFolder(tmp_path / "sweep").jobs()) == 2


def test_search_without_trials_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no trials"):
        run_sweep(settings(tmp_path, {}, search={"parameters": {"optim.lr": [1, 2]}}))


# --- debug trainings -------------------------------------------------------------------------------------------------


def debug_settings(tmp_path, store):
    sizes = [
        "model.d_model=16", "model.headdim=8", "model.d_state=4", f"model.n_codebooks={N_CODEBOOKS}",
        f"model.codebook_size={CODEBOOK_SIZE}", f"model.text_dim={TEXT_DIM}", f"data.frames={FRAMES}",
        "train.precision=fp32", "train.eval_every=2", "train.log_every=1",
    ]  # fmt: skip
    sweep_settings = settings(tmp_path, {"model.layers": ["mamba2", "attention"]}, steps=4, overrides=sizes)
    return OmegaConf.merge(sweep_settings, {"store": str(store)})


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


# --- reports --------------------------------------------------------------------------------------------------------


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
