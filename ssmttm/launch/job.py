"""What is run. A task is a picklable function of one item; a job is a sequence of commands with a folder of its own.

JOB/.lock         held by this process and by the job's own processes, which inherit it
JOB/log.txt       output of the commands
JOB/STAGE/        what one command writes
JOB/done.json     written last
JOB/failed.json   written instead if a stage failed for good; the next run tries again
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from ssmttm.errors import PREEMPTED, USER_ERROR, UserError
from ssmttm.files import is_locked, write_text

TRAIN = Path(__file__).parents[2] / "train.py"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
POLL_SECONDS = 0.2
_LOG_LINES = 3  # of a failed job's log that are shown
Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs tasks."""

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], label: str, device: bool = False
    ) -> Iterator[Result]:
        """Yield results as tasks finish, in any order. `label` is for errors; with `device` each task has a GPU."""


def run_command(
    command: Sequence[str], stopping: Callable[[], int], on_poll: Callable[[], None] = lambda: None, **options: Any
) -> int:
    """Run a command in a new session, so that Ctrl-C does not reach it; send it SIGTERM if `stopping()`."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    terminated = False
    try:
        while process.poll() is None:
            if stopping() and not terminated:
                os.killpg(process.pid, signal.SIGTERM)
                terminated = True
            on_poll()
            time.sleep(POLL_SECONDS)
        return process.returncode
    except BaseException:
        if not terminated:
            os.killpg(process.pid, signal.SIGTERM)
        raise


class CommandJob:
    """A job. A subclass defines `command`, `is_done` and `summary`.

    Args:
        folder: JOB.
        stages: their names, in order.
        retries: how many crashes are tried again; a pre-empted command is always run again.
        environment: variables added to those of this process.
    """

    def __init__(self, folder: Path, stages: Sequence[str], retries: int, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._stages, self._retries, self._environment = stages, retries, {**os.environ, **environment}

    def command(self, stage: str) -> list[str]:
        """The command line of a stage."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """The contents of done.json or failed.json."""
        raise NotImplementedError

    def run(self, stopping: Callable[[], int], on_poll: Callable[[], None] = lambda: None) -> str:
        """Run the stages, each of which resumes where it was stopped, until `stopping()`; return the outcome.

        Waits for processes left by a killed run and for another run of the same job, as both hold the job's lock.
        """
        with (self.folder / ".lock").open("ab") as lock:
            while not _acquire(lock) or is_locked(self.folder / self._stages[0]):
                if stopping():
                    return STOPPED
                time.sleep(POLL_SECONDS)
            if self.is_done():
                return DONE
            outcome = DONE
            for stage in self._stages:
                if outcome == DONE:
                    outcome = self._run_stage(stage, lock, stopping, on_poll)
            if outcome != STOPPED:
                write_text(self.folder / f"{outcome}.json", json.dumps(self.summary()) + "\n")
            return outcome

    def _run_stage(self, stage: str, lock: IO[bytes], stopping: Callable[[], int], on_poll: Callable[[], None]) -> str:
        while not stopping():
            (self.folder / "failed.json").unlink(missing_ok=True)
            command = self.command(stage)
            with (self.folder / "log.txt").open("ab", buffering=0) as log:
                log.write(f"\n$ {' '.join(command)}\n".encode())
                code = run_command(
                    command, stopping, on_poll, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=self._environment, pass_fds=[lock.fileno()],
                )  # fmt: skip
            while is_locked(self.folder / stage):  # by further processes of the command
                time.sleep(POLL_SECONDS)
            if stopping():
                break
            if code == 0:
                return DONE
            if code == PREEMPTED:  # by a signal that did not come from here
                continue
            if code == USER_ERROR or self._retries == 0:
                return FAILED
            self._retries -= 1
        return STOPPED


def _acquire(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def train_command(accelerate: str | None, port: int) -> list[str]:
    """`python train.py`, or `accelerate launch` of it with a file of configs/accelerate.

    Accelerate exits with 1 whatever the training exits with, so a user error is retried as if it were a crash.
    """
    if accelerate is None:
        return [sys.executable, str(TRAIN)]
    if not Path(accelerate).is_file():
        raise UserError(f"launcher.accelerate={accelerate}: no such file; see configs/accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launch, f"--config_file={accelerate}", f"--main_process_port={port}", str(TRAIN)]


def error_of(folder: Path) -> str:
    """The last error in a job's log, or else its last lines."""
    path = folder / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])
