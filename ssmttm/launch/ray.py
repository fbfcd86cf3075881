"""Tasks on a Ray cluster whose nodes share a file system."""

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ssmttm.errors import UserError
from ssmttm.launch.job import Item, Result


@dataclass(frozen=True)
class RayExecutor:
    """Ray tasks; with `device` a pool of actors, one a GPU, so that a model stays loaded from task to task.

    What runs on a lost node or in a killed worker is submitted again. A context manager that disconnects at the end.

    Args:
        address: of the cluster, such as `auto`; None starts one on this machine.
        cpus: a task's.
        gpus: a task's, if the cluster has any.
        retries: of a task whose worker or node was lost.
    """

    address: str | None = None
    cpus: int = 1
    gpus: int = 0
    retries: int = 16

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], label: str, device: bool = False
    ) -> Iterator[Result]:
        """See `Executor.run`. Raises UserError if Ray is not installed or not reachable, or loses a task too often."""
        ray = _connect(self.address)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if device:
            new_worker = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Actor).remote
            n_workers = gpus or cpus
        else:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus if gpus else 0, max_retries=0)(_call)
            new_worker = partial(SimpleNamespace, call=task)  # Ray finds a process for each task
            n_workers = 2 * cpus  # the second half is queued
        running: dict[Any, tuple[Any, Item, int]] = {}  # worker, item and losses of each task

        def start(worker: Any, item: Item, losses: int = 0) -> None:
            running[worker.call.remote(function, item)] = (worker, item, losses)

        for item in items[:n_workers]:
            start(new_worker(), item)
        waiting = iter(items[n_workers:])
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, item, losses = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the task's own exception, so that a UserError stays one line
            except ray.exceptions.RayError as error:
                if losses == self.retries:
                    raise UserError(
                        f"a worker was lost {losses + 1} times over one task of {label} (out of memory?): give Ray "
                        "fewer CPUs a node; finished work is kept"
                    ) from error
                start(new_worker(), item, losses + 1)
                continue
            yield result
            following = next(waiting, None)
            if following is not None:
                start(worker, following)


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


class _Actor:
    def call(self, function: Callable[[Item], Result], item: Item) -> Result:
        return function(item)


def _connect(address: str | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'ssmttm[ray]'") from error
    _check_reachable(address)
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from error
    return ray


def _check_reachable(address: str | None) -> None:
    """Fail at once where Ray itself would wait for minutes. Raises UserError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster at {address}: {error.strerror or error}") from error
