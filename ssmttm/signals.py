"""Signals that ask a run to stop: they set a flag, and the loop stops after the step at hand, with a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPT = signal.SIGINT
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the number of the signal received, or 0. A second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == INTERRUPT and INTERRUPT in received:
            raise KeyboardInterrupt(
                "stopped at once: the last checkpoint is intact, run the same command to go on from it"
            )
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield lambda: int(received[0]) if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
