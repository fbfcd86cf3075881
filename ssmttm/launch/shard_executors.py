"""Where shards are made: in processes of this machine, or as Ray tasks and actors. The work itself is the same."""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from data_prep.shard_task import Done, Work, do
from ssmttm.errors import UserError

_LOSSES = 4  # workers killed in a row, with no shard finished in between, before the run gives up
_RETRIES = 16  # of a shard on Ray, whose workers or nodes were lost
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Executor(Protocol):
    """Makes shards, in any order."""

    def run(self, works: Sequence[Work], device: bool) -> Iterator[Done]:
        """Yields each shard as it is finished. `device`: the work wants a GPU for itself."""


class Processes:
    """Processes of this machine, kept from stage to stage. A worker that is killed is replaced, its shard made again.

    A context manager: none of the processes outlives the block, and at an error they are killed.

    Args:
        workers: how many; with 1 the shards are made in this process.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pools: dict[bool, ProcessPoolExecutor] = {}  # of a process for each GPU, and of all workers

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for on_gpus in list(self._pools):
            self._close(on_gpus, kill=error is not None)

    def run(self, works: Sequence[Work], device: bool) -> Iterator[Done]:
        """As `Executor.run`. Raises UserError if workers are killed again and again."""
        gpus = _gpus() if device else []
        size = len(gpus) or self._workers
        if min(size, len(works)) <= 1:
            yield from map(do, works)
            return
        waiting, losses = {work.target: work for work in works}, 0
        while waiting:
            try:
                for done in _in_pool(self._pool(size, gpus), list(waiting.values()), 4 * size):
                    losses = 0
                    del waiting[done.folder]
                    yield done
            except BrokenProcessPool as error:
                self._close(bool(gpus), kill=True)
                losses += 1
                if losses == _LOSSES:
                    raise UserError(
                        f"a worker was killed {losses} times while {works[0].target.parent.name} was made (out of "
                        "memory?): give fewer --workers; what is finished is kept"
                    ) from error

    def _pool(self, size: int, gpus: list[str]) -> ProcessPoolExecutor:
        if bool(gpus) not in self._pools:
            context = multiprocessing.get_context("spawn")
            places = context.Queue()
            for place in gpus:
                places.put(place)
            begin = (os.getpid(), places if gpus else None)
            self._pools[bool(gpus)] = ProcessPoolExecutor(size, context, _begin_worker, begin)
        return self._pools[bool(gpus)]

    def _close(self, on_gpus: bool, kill: bool) -> None:
        pool = self._pools.pop(on_gpus)
        for process in list(pool._processes.values()) if kill else []:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _in_pool(pool: ProcessPoolExecutor, works: Sequence[Work], ahead: int) -> Iterator[Done]:
    running: set[Future[Done]] = set()
    waiting = iter(works)
    while True:
        while len(running) < ahead and (work := next(waiting, None)) is not None:
            with _one_thread_each():
                running.add(pool.submit(do, work))  # a process begins where none is idle
        if not running:
            return
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """What is set here, a process that begins here finds before it loads its libraries."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin_worker(parent: int, places: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "sched_getaffinity"):  # Linux
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if places is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = places.get()


def _gpus() -> list[str]:
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class Ray:
    """A Ray cluster that shares a file system: a pool of actors, one a GPU, for what wants one, tasks for the rest.

    What a lost node or a killed worker was making is handed in anew; shards are whole or absent, so it does not matter
    where the worker was.

    Args:
        address: of the cluster, such as `auto`; None starts one on this machine.
    """

    address: str | None = None

    def __enter__(self) -> "Ray":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()

    def run(self, works: Sequence[Work], device: bool) -> Iterator[Done]:
        """As `Executor.run`. Raises UserError if Ray is not installed or cannot be reached."""
        ray = _connect(self.address)
        size = int(ray.cluster_resources().get("GPU" if device else "CPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        if device:
            actor = ray.remote(num_cpus=1, num_gpus=1 if size else 0)(_Worker)
            places: list[_Place] = [_Actor(actor) for _ in range(min(len(works), size or cpus))]
        else:
            places = [_Tasks(ray.remote(num_cpus=1, max_retries=0)(do), 2 * size)]
        yield from _keep_busy(ray, works, places)


class _Worker:
    """An actor: a process that keeps its model from shard to shard."""

    def do(self, work: Work) -> Done:
        return do(work)


class _Place(Protocol):
    """Where works are handed in, `depth` of them at a time."""

    depth: int

    def submit(self, work: Work) -> Any: ...

    def renew(self) -> None:
        """After a worker was lost."""


class _Tasks:
    def __init__(self, task: Any, depth: int) -> None:
        self._task, self.depth = task, depth

    def submit(self, work: Work) -> Any:
        return self._task.remote(work)

    def renew(self) -> None:
        """The next task finds a worker anyway."""


class _Actor:
    depth = 1

    def __init__(self, actor: Any) -> None:
        self._class, self._actor = actor, actor.remote()

    def submit(self, work: Work) -> Any:
        return self._actor.do.remote(work)

    def renew(self) -> None:
        self._actor = self._class.remote()


def _keep_busy(ray: Any, works: Sequence[Work], places: Sequence[_Place]) -> Iterator[Done]:
    """Hand each place up to its depth of works at a time, yield what is finished, hand in anew what was lost."""
    waiting = iter(works)
    running: dict[Any, tuple[_Place, Work, int]] = {}  # and how often it was lost

    def feed(place: _Place) -> None:
        work = next(waiting, None)
        if work is not None:
            running[place.submit(work)] = (place, work, 0)

    for place in places:
        for _ in range(place.depth):
            feed(place)
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        place, work, losses = running.pop(ready)
        try:
            done = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # a user's mistake stays one line
        except ray.exceptions.RayError as error:
            if losses == _RETRIES:
                raise UserError(
                    f"a worker was lost {losses + 1} times over one shard (out of memory?): give Ray fewer CPUs a "
                    "node; what is finished is kept"
                ) from error
            place.renew()
            running[place.submit(work)] = (place, work, losses + 1)
            continue
        yield done
        feed(place)


def _connect(address: str | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray: pip install 'ssmttm[ray]', or leave --executor out") from error
    _check_reachable(address)
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from error
    return ray


def _check_reachable(address: str | None) -> None:
    """Ray itself waits for minutes. Raises UserError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster at {address}: {error.strerror or error}") from error
