"""Slurm scripts: quoting, signals and requeuing, run by bash with a fake scontrol."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from ssmttm.errors import UserError
from ssmttm.launch.slurm import log_pattern, write_script

TASK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, signal.SIG_DFL if sys.argv[2] == "starting" else lambda *_: sys.exit(75))
open(sys.argv[1], "w").write(sys.argv[2])
time.sleep(60 if sys.argv[2] in ("wait", "starting") else 0)
sys.exit(int(sys.argv[2]) if sys.argv[2].isdecimal() else 0)
"""


FOLDER = "it's a 100% #1 folder"
MORE_OPTIONS = ["gpus=1", "comment=a b & c", "exclusive"]


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Writes a script of six tasks to a folder with spaces and a percent sign; runs one, with a fake scontrol."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/bash\necho "$*" >> "{tmp_path}/requeued"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    folder = tmp_path / FOLDER
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = folder / "test.sbatch"
    command = [sys.executable, "-c", TASK, str(folder / "argument")]
    options = {"job-name": "test", "time": None, "array_limit": 2, "output": log_pattern(folder, "%a.log")}
    write_script(script, command, ["0", "75", "3", "wait", "it's $HOME", "starting"], options, MORE_OPTIONS)

    def start(task):
        return subprocess.Popen(["bash", script], stderr=subprocess.PIPE, text=True, env=os.environ | {
            "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7",
        })  # fmt: skip

    return start


def test_slurm_script_options_are_quoted(run_script, tmp_path):
    """sbatch splits a directive into words as a shell does; in its file patterns %% is a percent sign."""
    lines = (tmp_path / FOLDER / "test.sbatch").read_text().splitlines()
    assert [shlex.split(line.removeprefix("#SBATCH")) for line in lines[1:7]] == [
        ["--array=0-5%2"], ["--job-name=test"], [f"--output={tmp_path}/it's a 100%% #1 folder/%a.log"],
        ["--gpus=1"], ["--comment=a b & c"], ["--exclusive"],
    ]  # fmt: skip


def test_slurm_folder_that_no_directive_can_hold_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="backslash"):
        log_pattern(tmp_path / "a\\b", "%a.log")
    with pytest.raises(UserError, match="line break"):
        write_script(tmp_path / "x.sbatch", ["true"], ["0"], {"output": log_pattern(tmp_path / "a\nb", "%a.log")})


@pytest.mark.parametrize(("task", "code", "argument"), [(0, 0, "0"), (1, 75, "75"), (2, 3, "3"), (4, 0, "it's $HOME")])
def test_slurm_script_exits_with_its_task_and_requeues_on_75(run_script, tmp_path, task, code, argument):
    assert run_script(task).wait(30) == code
    assert (tmp_path / FOLDER / "argument").read_text() == argument
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 7_1\n" if code == 75 else "")


@pytest.mark.parametrize(("task", "code"), [(3, 75), (5, 128 + signal.SIGUSR1)], ids=["running", "starting"])
def test_slurm_script_passes_the_signal_on_and_requeues(run_script, tmp_path, task, code):
    """A program that was still starting has made no progress: requeued, it could do so for ever."""
    process = run_script(task)
    argument = tmp_path / FOLDER / "argument"
    deadline = time.monotonic() + 30
    while not (argument.exists() and argument.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "requeued").exists() == (task == 3)
    assert ("set a longer time limit" in errors) == (task == 5)
