"""The ranks of one training on this machine: python -m ssmttm.launch.ranks N COMMAND ...

Like `accelerate launch`, but it passes SIGUSR1, SIGTERM and Ctrl-C on to every rank, waits for their checkpoints
however long they take, and exits with their exit code: 75 when the training was pre-empted, so that Slurm can requeue
it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ssmttm.errors import PREEMPTED, UserError, run_cli
from ssmttm.launch.job import POLL_SECONDS
from ssmttm.signals import STOPPING

_GRACE_SECONDS = 30.0  # for the other ranks, once one has failed


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Run `command` as each rank of a training; returns its exit code, that of the first rank that failed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": str(port)}
            ranks.append(subprocess.Popen(command, env=os.environ | common | own, start_new_session=True))
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed, since = 0, 0.0
    while any(rank.poll() is None for rank in ranks):
        codes = [rank.poll() for rank in ranks]
        if not failed and (bad := [code for code in codes if code not in (None, 0, PREEMPTED)]):
            failed, since = int(bad[0] or 1), time.monotonic()
            for rank in ranks:
                rank.terminate()
        if failed and time.monotonic() - since > _GRACE_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    codes = [rank.poll() for rank in ranks]
    bad = [code for code in codes if code not in (None, 0, PREEMPTED)]
    code = failed or (bad[0] if bad else PREEMPTED if PREEMPTED in codes else 0)
    return int(code or 0) if not code or code > 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """N COMMAND ..."""
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        raise UserError("write `python -m ssmttm.launch.ranks N COMMAND ...` with the number of processes")
    return run_ranks(int(arguments[0]), arguments[1:])


if __name__ == "__main__":
    sys.exit(run_cli(lambda: main(sys.argv[1:])))
