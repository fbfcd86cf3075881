"""The batches of a training, and how long it waited for them."""

import time

from ssmttm.training.monitoring.watchdog import Watchdog
from ssmttm.training.tasks.base import Batch, Loader


class Batches:
    """The batches of a loader, one after the other from a position on. Close it when done.

    Attributes:
        waited: seconds for which `next` has waited.
    """

    def __init__(self, loader: Loader, watchdog: Watchdog, position: int) -> None:
        self._loader, self._watchdog, self.waited = loader, watchdog, 0.0
        self._go_to(position)

    def next(self) -> Batch:
        """The next batch."""
        begun = time.perf_counter()
        with self._watchdog.doing(f"loading batch {self._position}"):
            batch = next(self._batches)
        self.waited += time.perf_counter() - begun
        self._position += 1
        return batch

    def go_to(self, position: int) -> None:
        """Continue at another position."""
        self.close()
        self._go_to(position)

    def close(self) -> None:
        self._batches.close()

    def _go_to(self, position: int) -> None:
        self._position, self._batches = position, self._loader.iterate(position)
