"""Prefetching of batches in a thread that ends with its consumer."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

_POLL_SECONDS = 0.1


def prefetch_batches(make: Callable[[int], Any], start: int, ahead: int) -> Generator[Any, None, None]:
    """Yield make(start), make(start + 1), ... endlessly, up to `ahead` prepared in a daemon thread (0: no thread).

    An error of `make` is raised where its value would have been yielded. Closing the generator stops the thread and
    waits for it.
    """
    if ahead == 0:
        while True:
            yield make(start)
            start += 1
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def work() -> None:
        n = start
        while not stop.is_set():
            try:
                result: tuple[Any, BaseException | None] = (make(n), None)
            except BaseException as error:  # noqa: BLE001 - raised in the consumer
                result = (None, error)
            while not stop.is_set():
                try:
                    ready.put(result, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if result[1] is not None:
                return
            n += 1

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
