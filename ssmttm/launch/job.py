"""What is run. A task is a picklable function of one item; a job is a sequence of commands with a folder of its own.

JOB/.lock         locked by this process and by the job's own processes, which inherit the lock
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from ssmttm.errors import PREEMPTED, USER_ERROR, UserError
from ssmttm.files import is_locked, write_text

TRAIN = Path(__file__).parents[2] / "train.py"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
_LOG_LINES = 3  # of a failed job's log that are shown
Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs tasks, in any order."""

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], label: str, device: bool = False
    ) -> Iterator[Result]:
        """Yield each result as its task finishes.

        Args:
            label: what the items are, for error messages.
            device: each task needs a GPU to itself.
        """


class Command:
    """A command as a process in a session of its own, so that Ctrl-C reaches this process only."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._process: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, **options)
        self._stopping = False

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM once."""
        if not self._stopping and self.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        self._stopping = True


class CommandJob:
    """Runs its stages one after another; each resumes where it was stopped. Call `poll` until it returns an outcome.

    A process that an earlier, killed run left behind still holds the job's lock: the job waits for it to end. So it
    does for another run of the same job, such as a Slurm array that was submitted twice.

    Args:
        name: for progress and messages.
        folder: JOB.
        stages: their names.
        retries: how many crashes are tried again.
        environment: variables added to those of this process.
    """

    def __init__(
        self, name: str, folder: Path, stages: Sequence[str], retries: int, environment: Mapping[str, str]
    ) -> None:
        self.name, self.folder = name, folder
        self._stages, self._retries, self._environment = list(stages), retries, {**os.environ, **environment}
        self._process: Command | None = None
        self._lock: IO[bytes] | None = None
        self._stopping = False

    def command(self, stage: str) -> list[str]:
        """The command line of a stage."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """The contents of done.json or failed.json."""
        raise NotImplementedError

    def progress(self) -> str:
        """Progress in a few words."""
        raise NotImplementedError

    def poll(self) -> str | None:
        """Start the next stage if none runs; return DONE, FAILED or STOPPED at the end."""
        if self._process is None:
            if self._stopping:
                return self._close(STOPPED)
            if not self._acquire_lock() or is_locked(self.folder / self._stages[0]):
                return None
            if self.is_done():
                return self._close(DONE)
            self._start()
            return None
        code = self._process.poll()
        if code is None or is_locked(self.folder / self._stages[0]):
            return None
        self._process = None
        if self._stopping:
            return self._close(STOPPED)
        if code == 0:
            self._stages.pop(0)
            return None if self._stages else self._finish("done.json", DONE)
        if code == USER_ERROR or self._retries == 0:
            return self._finish("failed.json", FAILED)
        self._retries -= code != PREEMPTED
        return None

    def stop(self) -> None:
        """Ask the running process to write a checkpoint and exit; `poll` returns STOPPED once it has."""
        if self._process is not None:
            self._process.stop()
        self._stopping = True

    def _acquire_lock(self) -> bool:
        if self._lock is not None:
            return True
        lock = (self.folder / ".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def _start(self) -> None:
        assert self._lock is not None
        (self.folder / "failed.json").unlink(missing_ok=True)
        command = self.command(self._stages[0])
        with (self.folder / "log.txt").open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self._process = Command(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                pass_fds=[self._lock.fileno()],
            )  # fmt: skip

    def _finish(self, name: str, outcome: str) -> str:
        write_text(self.folder / name, json.dumps(self.summary()) + "\n")
        return self._close(outcome)

    def _close(self, outcome: str) -> str:
        if self._lock is not None:
            self._lock.close()
        return outcome


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
