"""Generations take turns on one worker thread, which alone runs the models.

At most `active` generations are open; the others wait in a queue, first come, first served. The open ones take turns,
one chunk of audio each, so that several listeners hear music at once.
"""

import logging
import threading
from collections import deque
from typing import Protocol

from ssmttm.errors import UserError
from ssmttm.web.limits import Limits

_logger = logging.getLogger(__name__)


class Busy(Exception):
    """There is no room for another generation.

    Attributes:
        status: of HTTP; 429 if this client has too many generations, 503 if the server has.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Generation(Protocol):
    """What the scheduler runs. `turn` is called in the worker thread, all else in any thread, with the scheduler's
    lock held: it must be quick and must not call the scheduler.

    Attributes:
        client: the address it came from.
    """

    client: str

    def ready(self) -> bool:
        """Whether there is something to do now; a listener with enough audio ahead has nothing."""

    def turn(self) -> bool:
        """Open the generation, or generate a chunk. Returns False once nothing is left."""

    def queued(self, position: int) -> None:
        """Told its place in the queue, from 1, at the start and whenever it changes."""

    def failed(self, message: str, status: int) -> None:
        """Told why it ended early, in one line, and the status of HTTP."""


class Scheduler:
    """Runs generations in one thread; see the module's text. `close` it at the end."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._active: deque[Generation] = deque()  # the next to take a turn first
        self._waiting: deque[Generation] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, replaces: Generation | None = None) -> None:
        """Start a generation, or put it into the queue. Raises Busy if there is no room.

        Args:
            replaces: a generation of the same listener that ends now; an open one gives its place.
        """
        with self._changed:
            is_open = replaces in self._active
            self._remove(replaces)
            self._check_room(generation.client)
            if is_open:
                self._active.append(generation)
            else:
                self._waiting.append(generation)
            self._update_queue()

    def cancel(self, generation: Generation | None) -> None:
        """End a generation, open or waiting, after its current turn; nothing if it has ended."""
        with self._changed:
            if self._remove(generation):
                self._update_queue()

    def wake(self) -> None:
        """Ask the generations again whether they are ready."""
        with self._changed:
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Numbers of open and of waiting generations."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def close(self) -> None:
        """End all generations, which are told so, and the thread, after the current turn."""
        with self._changed:
            self._closed = True
            ended = [*self._active, *self._waiting]
            self._active.clear()
            self._waiting.clear()
            self._changed.notify()
        for generation in ended:
            generation.failed("the server stops", 503)
        self._thread.join()

    def _check_room(self, client: str) -> None:
        if self._closed:
            raise Busy(503, "the server stops")
        same = sum(other.client == client for other in (*self._active, *self._waiting))
        if same >= self._limits.per_client:
            raise Busy(429, f"{same} generations of this address are under way: wait until one has ended")
        if len(self._active) >= self._limits.active and len(self._waiting) >= self._limits.waiting:
            raise Busy(503, f"the queue is full ({len(self._waiting)} are waiting): try again in a minute")

    def _remove(self, generation: Generation | None) -> bool:
        """Whether a generation was open or waiting; it no longer is."""
        for group in (self._active, self._waiting):
            if generation is not None and generation in group:
                group.remove(generation)
                return True
        return False

    def _update_queue(self) -> None:
        """Open generations from the queue while there is room, and tell the others their new places."""
        while self._waiting and len(self._active) < self._limits.active:
            self._active.append(self._waiting.popleft())
        for position, generation in enumerate(self._waiting, 1):
            generation.queued(position)
        self._changed.notify()

    def _work(self) -> None:
        while (generation := self._next()) is not None:
            if not _take_turn(generation):
                self.cancel(generation)

    def _next(self) -> Generation | None:
        """Wait for the next generation that is ready and move it to the end; None once the scheduler is closed."""
        with self._changed:
            while not self._closed:
                for generation in self._active:
                    if generation.ready():
                        self._active.remove(generation)
                        self._active.append(generation)
                        return generation
                self._changed.wait()
        return None


def _take_turn(generation: Generation) -> bool:
    """Whether a generation goes on after its turn. Errors end this generation only."""
    try:
        return generation.turn()
    except UserError as error:
        generation.failed(" ".join(str(error).split()), 422)
    except Exception:  # a bug must not stop the other listeners' music
        _logger.exception("a generation failed")
        generation.failed("the server failed: its log says why", 500)
    return False
