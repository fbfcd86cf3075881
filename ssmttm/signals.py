"""Signals that stop a run: they set a flag, and the loop stops after the current step with a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPT = signal.SIGINT
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the received signal, or 0. A second Ctrl-C stops immediately."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number == INTERRUPT and INTERRUPT in received:
            raise KeyboardInterrupt("stopped immediately: run the same command to continue from the last checkpoint")
        received.append(number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield lambda: int(received[0]) if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
