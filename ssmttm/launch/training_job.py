"""One job at work: its stages as processes, one after the other, each of which goes on where it was stopped.

    JOB/job.json        what it is
    JOB/.lock           held by whoever works on it: by the processes too, from their birth to their end
    JOB/log.txt         what its processes said
    JOB/timing/         a short run that tells how long a step takes, where the budget is in seconds
    JOB/run/            the training
    JOB/evaluation/     what `ssmttm evaluate` measured, where the sweep asks for it
    JOB/done.json       written last: the steps made, and what was evaluated
    JOB/failed.json     instead, if a stage failed for good; another start of the sweep tries again
"""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ssmttm.config import override
from ssmttm.errors import PREEMPTED, USER_ERROR, UserError
from ssmttm.files import is_locked, write_text
from ssmttm.sweeps.jobs import Job

TRAIN = Path(__file__).parents[2] / "train.py"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
_TIMED_STEPS = 30
_TOLD = 3  # last lines of a failed job's log that are shown
_TAIL = 65_536  # bytes of metrics.jsonl in which the last step is looked for


class Work:
    """A job being worked on; call `poll` until it gives an outcome.

    A process that an earlier, killed sweep left behind still holds the job: it is waited for, then gone on from. So is
    another sweep's, such as that of a Slurm array submitted twice.

    Args:
        folder: JOB.
        store: of the training and the evaluation.
        evaluate: overrides of `ssmttm evaluate`, or None.
        launch: what stands before `train.py` on the command line.
        retries: how often a crash is tried again.
        environment: added to this process's own.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        store: str,
        evaluate: Sequence[str] | None,
        launch: Sequence[str],
        retries: int,
        environment: Mapping[str, str],
    ) -> None:
        self.folder, self.job = folder, job
        self._store, self._evaluate, self._launch, self._retries = store, evaluate, launch, retries
        self._environment = {**os.environ, **environment}
        self._stages = [*(["timing"] if job.seconds else []), "run", *(["evaluation"] if evaluate else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._stopping = False

    def poll(self) -> str | None:
        """Start what is next if nothing runs; DONE, FAILED or STOPPED at the end."""
        if self._process is None:
            if self._stopping:
                return self._end(STOPPED)
            if not self._hold() or is_locked(self.folder / self._stages[0]):
                return None
            if is_done(self.folder, self._evaluate):
                return self._end(DONE)
            self._start()
            return None
        code = self._process.poll()
        if code is None or is_locked(self.folder / self._stages[0]):
            return None
        self._process = None
        if self._stopping:
            return self._end(STOPPED)
        if code == 0:
            self._stages.pop(0)
            return None if self._stages else self._finish("done.json", DONE)
        if code == USER_ERROR or self._retries == 0:
            return self._finish("failed.json", FAILED)
        self._retries -= code != PREEMPTED
        return None

    def stop(self) -> None:
        """Ask the running process, once, for a checkpoint and an end; `poll` says when it has stopped."""
        if not self._stopping and self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        self._stopping = True

    def steps(self) -> int:
        """Training steps done."""
        return last_step(self.folder / "run")

    def _hold(self) -> bool:
        """Whether the job is this work's. Its processes inherit the lock, which so lasts as long as any of them."""
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

    def _end(self, outcome: str) -> str:
        if self._lock is not None:
            self._lock.close()
        return outcome

    def _start(self) -> None:
        (self.folder / "failed.json").unlink(missing_ok=True)
        command = self._command(self._stages[0])
        with (self.folder / "log.txt").open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                start_new_session=True, pass_fds=[self._lock.fileno()] if self._lock else (),
            )  # fmt: skip

    def _command(self, stage: str) -> list[str]:
        folder = self.folder / stage
        if stage == "evaluation":
            where = {"checkpoint": self.folder / "run", "store": self._store, "out": folder}
            words = [override(key, value) for key, value in where.items()]
            return [sys.executable, "-m", "ssmttm.cli.main", "evaluate", *(self._evaluate or ()), *words]
        overrides = [*self.job.overrides, override("data.store", self._store), override("run_dir", folder)]
        if stage == "timing":
            overrides += [f"train.steps={_TIMED_STEPS}", "train.log_every=5", "train.eval_every=0"]
        elif self.job.seconds:
            overrides += [f"train.steps={steps_within(self.job.seconds, self.folder / 'timing')}"]
        return [*self._launch, str(TRAIN), *overrides]

    def _finish(self, name: str, outcome: str) -> str:
        evaluate = None if self._evaluate is None else list(self._evaluate)
        write_text(self.folder / name, json.dumps({"steps": self.steps(), "evaluate": evaluate}) + "\n")
        return self._end(outcome)


def launch_command(accelerate: str | None, port: int) -> list[str]:
    """`accelerate launch` with a file of configs/accelerate; for one process Python alone.

    Accelerate's launcher exits with 1 whatever the training exits with: a mistake is then tried again as a crash is.
    """
    if accelerate is None:
        return [sys.executable]
    if not Path(accelerate).is_file():
        raise UserError(f"launcher.accelerate={accelerate}: there is no such file; see configs/accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launch, f"--config_file={accelerate}", f"--main_process_port={port}"]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; none if it has not begun."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The last step that a run has recorded, or 0; looked at often, so only the file's end is read."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def steps_within(seconds: float, timing: Path) -> int:
    """How many steps fit into so many seconds, by the median of the timed ones but the first."""
    each = [row["seconds_per_step"] for row in read_metrics(timing) if "seconds_per_step" in row]
    return max(1, round(seconds / statistics.median(each[1:])))


def is_done(folder: Path, evaluate: Sequence[str] | None = None) -> bool:
    """Whether a job has finished its training, and this evaluation if one is asked for."""
    path = folder / "done.json"
    return path.is_file() and (evaluate is None or json.loads(path.read_text()).get("evaluate") == list(evaluate))


def is_failed(folder: Path) -> bool:
    """Whether a job was given up."""
    return (folder / "failed.json").is_file()


def failure_of(folder: Path) -> str:
    """The last error that a job's log names, else its last lines."""
    path = folder / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    named = [line for line in lines if line.startswith("error: ")]
    return named[-1] if named else "\n".join([line for line in lines if line.strip()][-_TOLD:])
