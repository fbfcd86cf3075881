"""What the processes of a training agree on and do together, however long one of them takes."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from ssmttm.errors import UserError
from ssmttm.training.monitoring.watchdog import Watchdog

_LONGEST_WAIT = timedelta(days=30)
_Result = TypeVar("_Result")


class Ranks:
    """What the processes of a training agree on, however long one of them takes.

    The main process samples, verifies and writes checkpoints alone. The others would meet it in the next all-reduce,
    which fails after the time limit of the process group. So they wait here first, in a gloo group of their own, on the
    CPU: no device is waited for. All processes must construct it and call its methods together; a process that died
    ends the wait, one that is late is named by the watchdog.
    """

    def __init__(self, accelerator: Accelerator, watchdog: Watchdog) -> None:
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._watchdog = watchdog
        self._group = _new_group(self._world_size)

    def wait(self) -> None:
        """Wait for all processes."""
        self.any([])

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any process has set each flag."""
        if self._group is None:
            return list(flags)
        result = torch.tensor([False, *flags], dtype=torch.uint8)
        if self._rank == 0:
            others = [torch.empty_like(result) for _ in range(1, self._world_size)]
            requests = [distributed.irecv(other, rank, self._group) for rank, other in enumerate(others, 1)]
            for rank, request in enumerate(requests, 1):
                assert request is not None  # this rank is in the group
                with self._watchdog.doing(f"waiting for rank {rank}"):
                    request.wait()
            result = torch.stack([result, *others]).amax(0)
        else:
            distributed.send(result, 0, self._group)
        with self._watchdog.doing("waiting for rank 0"):
            distributed.broadcast(result, 0, self._group)
        return [bool(flag) for flag in result[1:]]


class JointWork:
    """Work that all ranks do together in a thread of each, beside the training, in a gloo group of its own.

    An error on one rank is raised on every rank, so that none waits for one that failed. All ranks must construct it
    together, and call its methods in the same order.

    Attributes:
        rank, world_size: of this process.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._group = _new_group(world_size)

    def on_first(self, work: Callable[[], _Result]) -> _Result:
        """Rank 0 does it; every rank gets its result."""
        results: list[Any] = self.on_each(work if self.rank == 0 else _nothing)
        return results[0]

    def on_each(self, work: Callable[[], _Result]) -> list[_Result]:
        """Every rank does it, and gets the results of all, in their order."""
        result: _Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - raised below, on every rank
            error = caught
        problem = error if error is None or isinstance(error, UserError) else repr(error)
        outcomes: list[Any] = [(result, problem)] * self.world_size
        if self._group is not None:
            distributed.all_gather_object(outcomes, (result, problem), self._group)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise problem if isinstance(problem, UserError) else RuntimeError(f"rank {rank}: {problem}")
        return [result for result, _ in outcomes]


def _nothing() -> None: ...


def _new_group(world_size: int) -> Any:
    return distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT) if world_size > 1 else None
