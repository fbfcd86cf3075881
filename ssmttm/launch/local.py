"""Tasks and jobs as processes of this machine."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any

from ssmttm.errors import Preempted, UserError
from ssmttm.launch.job import Item, Result
from ssmttm.signals import INTERRUPT, stop_requests

_MAX_LOSSES = 4  # workers killed in a row, with no task finished in between, before the run gives up
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class ProcessExecutor:
    """A pool of processes, kept between runs. A killed worker is replaced and its task run again.

    A context manager: no process outlives the block; on an error they are killed.

    Args:
        workers: number of processes; with 1 the tasks run in this process.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pools: dict[bool, futures.ProcessPoolExecutor] = {}  # one worker a GPU (True), or on the CPU (False)

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for on_gpus in list(self._pools):
            self._close(on_gpus, kill=kind is not None)

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], label: str, device: bool = False
    ) -> Iterator[Result]:
        """See `Executor.run`. Raises UserError if workers are killed again and again."""
        gpus = visible_gpus() if device else []
        size = len(gpus) or self._workers
        if min(size, len(items)) <= 1:
            yield from map(function, items)
            return
        waiting, losses = list(items), 0
        while waiting:
            try:
                with _one_thread():
                    for item, result in _run_unordered(self._pool(size, gpus), function, list(waiting), 4 * size):
                        losses = 0
                        waiting.remove(item)
                        yield result
            except BrokenProcessPool as error:
                self._close(bool(gpus), kill=True)
                losses += 1
                if losses == _MAX_LOSSES:
                    raise UserError(
                        f"a worker was killed {losses} times while {label} was made (out of memory?): give fewer "
                        "--workers; finished work is kept"
                    ) from error

    def _pool(self, size: int, gpus: list[str]) -> futures.ProcessPoolExecutor:
        if bool(gpus) not in self._pools:
            context = multiprocessing.get_context("spawn")
            free_gpus = context.Queue()
            for gpu in gpus:
                free_gpus.put(gpu)
            arguments = (os.getpid(), free_gpus if gpus else None)
            self._pools[bool(gpus)] = futures.ProcessPoolExecutor(size, context, _init_worker, arguments)
        return self._pools[bool(gpus)]

    def _close(self, on_gpus: bool, kill: bool) -> None:
        pool = self._pools.pop(on_gpus)
        for process in list(pool._processes.values()) if kill else []:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _run_unordered(
    pool: futures.Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Result]]:
    """Keep `depth` items submitted, taken one by one; yield each with its result as it finishes."""
    running: dict[futures.Future[Result], Item] = {}
    waiting = iter(items)
    while True:
        while len(running) < depth and (item := next(waiting, None)) is not None:
            running[pool.submit(function, item)] = item
        if not running:
            return
        for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started here see OMP_NUM_THREADS=1 before they load their libraries."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _init_worker(parent: int, free_gpus: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if free_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = free_gpus.get()


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time; `gpus` as in CUDA_VISIBLE_DEVICES, None for those that this process sees."""

    index: int = 0
    gpus: str | None = None


def slots(gpus: int, threads: int, parallel: int | None) -> list[Slot]:
    """One slot for every `gpus` GPUs of this machine, or without any for every `threads` cores; at most `parallel`."""
    visible = visible_gpus()
    if visible and gpus:
        if len(visible) < gpus:
            raise UserError(f"launcher.gpus={gpus}: this machine has {len(visible)}")
        groups = [",".join(visible[i : i + gpus]) for i in range(0, len(visible) - gpus + 1, gpus)]
        return [Slot(index, group) for index, group in enumerate(groups[:parallel])]
    return [Slot(index) for index in range(parallel or max(1, len(os.sched_getaffinity(0)) // threads))]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def run_jobs(
    items: Iterable[Item],
    run: Callable[[Item, Slot, Callable[[], int]], Result],
    slots: Sequence[Slot],
    on_end: Callable[[Item, Result], None],
    resume_hint: str,
) -> None:
    """Run jobs in threads, one in each slot at a time.

    Args:
        items: the jobs, taken one by one as slots become free.
        run: runs one job in a slot and returns its outcome; stops the job if the function that it is given returns a
            signal.
        on_end: called with each job and its outcome before the next job is taken.
        resume_hint: message if a signal stops the run.

    Raises:
        Preempted, KeyboardInterrupt: a signal came; every job has stopped with a checkpoint.
    """
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    error = Event()
    with stop_requests() as received, futures.ThreadPoolExecutor(len(slots)) as pool:

        def pending() -> Iterator[Item]:
            waiting = iter(items)
            while not received() and (item := next(waiting, None)) is not None:
                yield item

        def stopping() -> int:
            if error.is_set():
                raise futures.CancelledError
            return received()

        def run_in_slot(item: Item) -> Result:
            slot = free.get()
            try:
                return run(item, slot, stopping)
            finally:
                free.put(slot)

        try:
            for item, outcome in _run_unordered(pool, run_in_slot, pending(), len(slots)):
                on_end(item, outcome)
        except BaseException:
            error.set()
            raise
    if received():
        raise KeyboardInterrupt(resume_hint) if received() == INTERRUPT else Preempted(resume_hint)
