"""Tasks on a Ray cluster whose nodes share a file system."""

import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ssmttm.errors import UserError
from ssmttm.launch.job import Item, Result


@dataclass(frozen=True)
class RayExecutor:
    """Ray tasks; with `device` a pool of actors, one a GPU, so that a model stays loaded from task to task.

    What was lost with a node or a killed worker runs again: Ray retries tasks, lost actors are replaced here. A context
    manager that disconnects at the end.

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
            actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Actor)
            workers = [actor.remote() for _ in range(min(len(items), gpus or cpus))]
        else:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus if gpus else 0, max_retries=self.retries)(_call)
            workers = [SimpleNamespace(call=task) for _ in range(2 * cpus)]  # half of them wait in Ray's queue
        waiting = deque((item, 0) for item in items)  # with the number of actors lost over it
        running: dict[Any, tuple[Any, Item, int]] = {}
        while waiting or running:
            while waiting and workers:
                worker, (item, losses) = workers.pop(), waiting.popleft()
                running[worker.call.remote(function, item)] = worker, item, losses
            (ready,), _ = ray.wait(list(running))
            worker, item, losses = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the task's own exception, so that a UserError stays one line
            except ray.exceptions.RayError as error:
                if not isinstance(error, ray.exceptions.RayActorError) or losses == self.retries:
                    raise UserError(
                        f"a worker was lost {self.retries + 1} times over one task of {label} (out of memory?): give "
                        "Ray fewer CPUs a node; finished work is kept"
                    ) from error
                workers.append(actor.remote())  # Ray's own restarts give up on an actor that is lost while it starts
                waiting.append((item, losses + 1))
                continue
            workers.append(worker)
            yield result


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
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():  # fails at once where Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        raise UserError(f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}") from error
    return ray
