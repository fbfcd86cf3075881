"""The progress bar of sampling, in seconds of audio."""

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

_BAR = "{l_bar}{bar}| {n:.1f}/{total:.1f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress:
    """A bar on standard error while it is entered; lines and warnings are printed above it.

    Args:
        total: seconds of audio to come.
    """

    def __init__(self, total: float) -> None:
        self._bar = tqdm(total=total, desc="sampling", unit="s", bar_format=_BAR)
        self._warnings = _AboveTheBar(logging.WARNING)
        self._lap = (time.perf_counter(), 0.0)

    def __enter__(self) -> Self:
        logging.getLogger("ssmttm").addHandler(self._warnings)
        return self

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("ssmttm").removeHandler(self._warnings)
        self._bar.close()

    def advance(self, seconds: float) -> None:
        """Count audio just made; the last frame's overhang beyond the total is left out."""
        self._bar.update(min(seconds, self._bar.total - self._bar.n))

    def lap(self) -> float:
        """Seconds of audio made a second of time since the last lap: above 1 is faster than real time."""
        before, now = self._lap, (time.perf_counter(), self._bar.n)
        self._lap = now
        return (now[1] - before[1]) / max(now[0] - before[0], 1e-9)

    def say(self, line: str) -> None:
        """Print a line on standard output."""
        tqdm.write(line, file=sys.stdout)


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"warning: {record.getMessage()}", file=sys.stderr)
