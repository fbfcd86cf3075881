"""Sweeps that are killed, or stopped by a signal, and run again."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from small_sweeps import FAKE, RATES, lines, settings, starts, use_fake_training

from ssmttm.errors import UserError
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.run import run_sweep

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
def fake(monkeypatch):
    use_fake_training(monkeypatch)


@pytest.fixture
def start(tmp_path):
    """Starts the same sweep of four jobs in a new process."""
    path = tmp_path / "settings.yaml"
    path.write_text(OmegaConf.to_yaml(settings(tmp_path, RATES, steps=30, seeds=[0, 1])))
    return lambda: subprocess.Popen([sys.executable, "-c", SWEEP, str(FAKE), str(path)], stderr=subprocess.DEVNULL)


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
