"""Exit codes and retries of every launcher: finished, user error, crash, pre-empted, killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import main as prepare
from ssmttm import config
from ssmttm.cli.main import main
from ssmttm.compress.recipe import run_training
from ssmttm.errors import INTERRUPTED, PREEMPTED, USER_ERROR, UserError, run_cli
from ssmttm.files import is_locked
from ssmttm.launch import job
from ssmttm.launch.local import ProcessExecutor
from ssmttm.sweeps import launchers
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import expand
from ssmttm.sweeps.run import run_sweep

FAKE = Path(__file__).parent / "fake_train.py"
# (what the training does, see fake_train.py; retries; exit code of the sweep; how often the training starts)
OUTCOMES = [
    pytest.param(1, 0, 0, 1, id="finished"),
    pytest.param(667, 1, USER_ERROR, 1, id="user error"),
    pytest.param(666, 1, USER_ERROR, 2, id="crash"),
    pytest.param(668, 1, 0, 2, id="crash, retried"),
    pytest.param(669, 0, 0, 2, id="pre-empted, no retries"),
    pytest.param(670, 1, USER_ERROR, 2, id="killed"),
    pytest.param(671, 1, 0, 2, id="killed, retried"),
]


class OneProcess(ProcessExecutor):
    """A cluster of one worker, this process."""

    def __init__(self, *_: object) -> None:
        super().__init__(1)


def sweep_settings(tmp_path: Path, behaviour: int, retries: int, kind: str = "local") -> DictConfig:
    """A sweep of one job."""
    composed = config.load(f"launcher={kind}", root="sweep")
    OmegaConf.set_struct(composed, False)
    sweep = {
        "name": "s", "experiment": "debug", "grid": {"train.log_every": [behaviour]}, "budget": {"steps": 5},
    }  # fmt: skip
    changes = {"store": "none", "out": str(tmp_path / "sweep"), "launcher": {"retries": retries}, "sweep": sweep}
    return OmegaConf.merge(composed, changes)


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray"])
@pytest.mark.parametrize(("behaviour", "retries", "code", "starts"), OUTCOMES)
def test_sweep_exits_as_its_job_ends(tmp_path, monkeypatch, capsys, launcher, behaviour, retries, code, starts):
    """Of Slurm, this is an array task; of Ray, a task in this process."""
    monkeypatch.setattr(job, "TRAIN", FAKE)
    monkeypatch.setattr(job, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(launchers, "RayExecutor", OneProcess)
    settings, folder = sweep_settings(tmp_path, behaviour, retries, launcher), SweepFolder(tmp_path / "sweep")
    name = f"{behaviour}-seed0"
    if launcher == "slurm":
        folder.add_jobs(expand(settings.sweep))
        folder.write_config(settings)
        assert run_cli(lambda: main(["sweep", "job", str(folder.path), name])) == code
    else:
        assert run_cli(lambda: run_sweep(settings) and None) == code
    assert (folder.job_folder(name) / "run" / "starts").read_text().count("start") == starts
    assert (folder.is_done(name), folder.is_failed(name)) == (code == 0, code != 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert bool(errors) == (code != 0) and all(name in line and "log.txt" in line for line in errors[-1:])


SWEEP = """
import sys
from omegaconf import OmegaConf
from ssmttm.errors import run_cli
from ssmttm.files import is_locked
from ssmttm.launch import job
from ssmttm.sweeps import run
job.TRAIN, job.POLL_SECONDS = sys.argv[1], 0.02
sys.exit(run_cli(lambda: run.run_sweep(OmegaConf.load(sys.argv[2])) and None))
"""


def test_second_ctrl_c_stops_a_sweep_at_once(tmp_path):
    """The first one waits for the checkpoint, which takes 4 s."""
    settings = sweep_settings(tmp_path, 672, 0)
    settings.sweep.budget.steps = 1000
    path = tmp_path / "settings.yaml"
    path.write_text(OmegaConf.to_yaml(settings))
    command = [sys.executable, "-c", SWEEP, str(FAKE), str(path)]
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "sweep" / "jobs" / "672-seed0" / "run"
    while not (run / "metrics.jsonl").is_file():
        time.sleep(0.02)
    sweep.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert sweep.poll() is None
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == INTERRUPTED
    assert is_locked(run), "the training is still writing its checkpoint"
    last = sweep.stderr.read().splitlines()[-1]
    assert last.startswith("interrupted: stopped immediately") and "Traceback" not in last


@pytest.mark.parametrize(
    ("ends", "code", "message"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2)", USER_ERROR, "the training of lm failed"),
        ("sys.exit(75)", PREEMPTED, "run the same command to resume"),
        ("os.kill(os.getpid(), 9)", USER_ERROR, "was killed by SIGKILL (out of memory?)"),
    ],
)
def test_compression_exits_as_its_training_ends(capsys, ends, code, message):
    """A crash is a traceback, see test_compression.py."""
    command = [sys.executable, "-c", f"import os, sys; {ends}"]
    assert run_cli(lambda: run_training(command, "lm")) == code
    assert message in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Also where the tests run in the background, where a shell lets programs ignore Ctrl-C."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (lambda: None, 0),
        (lambda: (_ for _ in ()).throw(UserError("what, where, what to do")), USER_ERROR),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), PREEMPTED),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), PREEMPTED),
        (lambda: os.kill(os.getpid(), signal.SIGINT), INTERRUPTED),
    ],
    ids=["finished", "user error", "SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_data_preparation_exits_as_its_stage_ends(tmp_path, monkeypatch, capsys, interruptible, action, code):
    """A crash is a traceback; killed workers are in test_prep_engine.py."""
    monkeypatch.setattr("data_prep.pipeline.prepare", lambda *_: action())
    monkeypatch.setattr("data_prep.stages.pack.summary", lambda store: "summary")
    words = ["builtin", "--hours", "0.01", "--out", str(tmp_path / "store"), "--codec", "none", "--text", "none"]
    assert run_cli(lambda: prepare(words)) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == (code != 0)
