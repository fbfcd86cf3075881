"""Tasks on a Ray cluster whose nodes share a file system."""

import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ssmttm.errors import UserError
from ssmttm.launch.job import Item, Result


@dataclass(frozen=True)
class RayExecutor:
    """Ray tasks, which Ray runs again when a worker or node is lost; with `device` each takes a GPU, if there is one.

    On GPUs Ray starts a new process for each task, which loads the model anew. (Actors would keep it, but one that is
    lost while it starts is not always replaced.) A context manager that disconnects at the end.

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
        gpus = 1 if device else self.gpus
        if not ray.cluster_resources().get("GPU", 0):
            gpus = 0
        task = ray.remote(num_cpus=self.cpus, num_gpus=gpus, max_retries=self.retries)(_call)
        waiting, running = deque(items), []
        while waiting or running:
            while waiting and len(running) < 2 * cpus:  # half of them wait in Ray's queue
                running.append(task.remote(function, waiting.popleft()))
            (ready,), running = ray.wait(running)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the task's own exception, so that a UserError stays one line
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"a worker was lost {self.retries + 1} times over one task of {label} (out of memory?): give Ray "
                    "fewer CPUs a node; finished work is kept"
                ) from error


def _call(function: Callable[[Item], Result], item: Item) -> Result:
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
