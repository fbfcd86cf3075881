"""How many threads torch computes with, and how they wait for each other.

torch's OpenMP threads spin for milliseconds wherever they wait for each other. On a quiet machine that saves the time
to fall asleep and to be woken; beside other busy processes they spin while the thread that they wait for does not run,
which makes a training some 20 times slower (docs/performance.md). How long they spin is fixed once libgomp is loaded,
with one exception (its manual, GOMP_SPINCOUNT): it hardly spins while a process has more OpenMP threads than
processors. `spin_when_alone` uses that. This module loads no torch.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_INTERVAL = 0.3  # seconds between two measurements
_BUSY, _QUIET = 0.2, 0.1  # processors that others use, above and below which spinning changes
_QUIET_INTERVALS = 10  # in a row, in which more than one thread computes, before the threads spin again
_SMALL = 50_000_000  # parameters
_STATISTICS = Path("/proc/stat")
_SHARED = 1 << 18  # elements of a sum that torch shares among its threads


def use_threads(n: int) -> None:
    """Let torch compute with `n` threads, unless the user has set their number in the environment."""
    import torch

    if not any(name in os.environ for name in _COUNT):
        torch.set_num_threads(n)


def use_threads_for_sampling(n_parameters: int = 0) -> None:
    """One thread for a small model, whose steps gain nothing from a second one, and to load any; else all cores."""
    use_threads(1 if n_parameters < _SMALL else _processors())


def _processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def spin_when_alone() -> Iterator[None]:
    """Inside, torch's threads spin only while other processes leave them their processors.

    A second team of OpenMP threads, which sleeps, stops the spinning. It is formed and freed as needed. Nothing is done
    if the user has set how threads wait, while torch uses one thread, or on a system that does not tell how busy its
    processors are.
    """
    if any(name in os.environ for name in _WAITING) or not _STATISTICS.exists():
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=[stop], name="spin_when_alone", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


class IdleTeam:
    """OpenMP threads that sleep until `free`."""

    def __init__(self) -> None:
        self._formed, self._free = threading.Event(), threading.Event()
        self._owner = threading.Thread(target=self._hold, name="idle OpenMP team", daemon=True)
        self._owner.start()
        self._formed.wait()

    def free(self) -> None:
        self._free.set()
        self._owner.join()

    def _hold(self) -> None:
        import torch

        torch.ones(_SHARED).sum()  # each thread that shares work gets a team of its own, until it ends
        self._formed.set()
        self._free.wait()


def busy_seconds() -> float:
    """Seconds for which the processors of this process were busy since the system's start, whoever used them."""
    own = os.sched_getaffinity(0)
    ticks = 0
    for line in _STATISTICS.read_text().splitlines():
        name, *values = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in own:
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _times() -> tuple[float, float, float]:
    """Seconds: of the clock, of this process's computing, of that of others on its processors."""
    computed = time.process_time()
    return time.monotonic(), computed, busy_seconds() - computed


def _torch_threads() -> int:
    """Threads that torch computes with; 0 until it is imported to its end."""
    count: Any = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return count() if count else 0


def _watch(stop: threading.Event) -> None:
    team: IdleTeam | None = None
    quiet = 0
    before = _times()
    while not stop.wait(_INTERVAL):
        now = _times()
        seconds, computed, others = (b - a for a, b in zip(before, now, strict=True))
        before = now
        spare = max(0, _processors() - _torch_threads())  # processors that torch leaves to others
        if others > (spare + _QUIET) * seconds:
            quiet = 0
        elif computed > seconds:
            quiet += 1
        if team is None and others > (spare + _BUSY) * seconds and _torch_threads() > 1:
            team = IdleTeam()
        elif team is not None and quiet >= _QUIET_INTERVALS:
            team.free()
            team = None
    if team is not None:
        team.free()
