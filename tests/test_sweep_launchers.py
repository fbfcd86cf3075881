"""Sweeps on Slurm and Ray, and searches by Optuna."""

import os
import signal

import optuna
import pytest
from omegaconf import OmegaConf
from small_stores import write_codes_store
from small_sweeps import FAKE, HERE, RATES, debug_settings, settings, starts, use_fake_training

from ssmttm import config
from ssmttm.errors import Preempted, UserError
from ssmttm.launch import job as launch_job
from ssmttm.launch.job import CommandJob
from ssmttm.sweeps.collect import collect
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.run import run_sweep


@pytest.fixture
def fake(monkeypatch):
    use_fake_training(monkeypatch)


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
    (patched / "sitecustomize.py").write_text(f"from ssmttm.launch import job\njob.TRAIN = {str(FAKE)!r}\n")
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
