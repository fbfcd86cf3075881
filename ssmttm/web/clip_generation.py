"""A whole clip for POST /v1/generate, generated in turns."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ssmttm.errors import UserError
from ssmttm.web.recording import to_int16

if TYPE_CHECKING:
    from ssmttm.generation.session import StreamSession


class ClipGeneration:
    """See `ssmttm.web.scheduler.Generation`.

    Attributes:
        audio: int16 [S, C], once all of it is generated; or UserError, or HTTPException
            for a bug.
    """

    def __init__(self, client: str, open_session: "Callable[[], StreamSession]") -> None:
        self.client = client
        self.audio: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._open = open_session
        self._session: StreamSession | None = None
        self._chunks: list[np.ndarray] = []

    def ready(self) -> bool:
        """Always: the whole clip is wanted."""
        return True

    def turn(self) -> bool:
        """Open the session, or generate a chunk."""
        if self._session is None:
            self._session = self._open()
            return True
        chunk = self._session.next_chunk()
        if chunk is not None:
            self._chunks.append(to_int16(chunk))
            return True
        self._settle(self.audio.set_result, np.concatenate(self._chunks))
        return False

    def queued(self, position: int) -> None:
        """Nothing: an HTTP answer has no place for it; GET /v1/status tells the length of the queue."""

    def failed(self, message: str, is_bug: bool) -> None:
        """Hand the error to the route."""
        from starlette.exceptions import HTTPException

        self._settle(self.audio.set_exception, HTTPException(500, message) if is_bug else UserError(message))

    def _settle(self, settle: Callable[..., None], value: object) -> None:
        """Set the future in its own thread, unless its request is gone."""
        loop = self.audio.get_loop()
        loop.call_soon_threadsafe(lambda: None if self.audio.done() else settle(value))
