"""Names what a process of a training has been doing for too long, so that a stalled loader or rank is found."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Watchdog:
    """A thread that prints one line on standard error for each activity that takes longer than `seconds`.

    A context manager, which ends the thread.

    Args:
        rank: of this process, for the line.
        seconds: 0: no thread.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank, self._seconds = rank, seconds
        self._activity: tuple[str, float] | None = None  # what, since when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if seconds else None

    def __enter__(self) -> "Watchdog":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Watch what happens within the `with` block; `what` as in "rank 0 has been {what} for 300 s"."""
        outer, self._activity = self._activity, (what, time.monotonic())
        try:
            yield
        finally:
            self._activity = outer

    def _watch(self) -> None:
        reported = None
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            activity = self._activity
            if activity is None or activity is reported or time.monotonic() - activity[1] < self._seconds:
                continue
            reported = activity
            elapsed = time.monotonic() - activity[1]
            print(f"warning: rank {self._rank} has been {activity[0]} for {elapsed:.0f} s", file=sys.stderr, flush=True)
