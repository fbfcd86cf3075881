"""Prefetching of batches in a thread that ends with its consumer."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetch_batches(make: Callable[[int], Any], start: int, ahead: int) -> Generator[Any, None, None]:
    """Yield make(start), make(start + 1), ... endlessly, up to `ahead` prepared in a thread (0: no thread).

    An error of `make` is raised where its value would have been yielded. Closing the generator stops the thread and
    waits for it.
    """
    while ahead == 0:
        yield make(start)
        start += 1
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        futures = deque(executor.submit(make, start + n) for n in range(ahead))
        while True:
            value = futures.popleft().result()
            futures.append(executor.submit(make, start + ahead))
            start += 1
            yield value
    finally:
        executor.shutdown(cancel_futures=True)
