"""The progress bar of sampling, in seconds of audio."""

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

_BAR = "{l_bar}{bar}| {n:.1f}/{total:.1f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress:
    """A context manager with a bar of `total` seconds of audio on standard error; lines and warnings go above it."""

    def __init__(self, total: float) -> None:
        self._bar = tqdm(total=total, desc="sampling", unit="s", bar_format=_BAR)
        self._handler = _TqdmHandler(logging.WARNING)
        self._last = (time.perf_counter(), 0.0)

    def __enter__(self) -> Self:
        logging.getLogger("ssmttm").addHandler(self._handler)
        return self

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("ssmttm").removeHandler(self._handler)
        self._bar.close()

    def advance(self, seconds: float) -> None:
        """Count newly sampled audio, up to the total (the last frame may exceed it)."""
        self._bar.update(min(seconds, self._bar.total - self._bar.n))

    def throughput(self) -> float:
        """Seconds of audio per second since the last call: above 1 is faster than real time."""
        last, self._last = self._last, (time.perf_counter(), self._bar.n)
        return (self._last[1] - last[1]) / max(self._last[0] - last[0], 1e-9)

    def print(self, line: str) -> None:
        """Print a line on standard output."""
        tqdm.write(line, file=sys.stdout)


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"warning: {record.getMessage()}", file=sys.stderr)
