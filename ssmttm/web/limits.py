"""Limits of the server, and the middleware that enforces those on the bodies of requests."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ssmttm.generation.request import MAX_DURATION

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIPS_PATH = "/v1/clips"
_ENVELOPE_BYTES = 4096  # of a multipart body, around the file


@dataclass(frozen=True)
class Limits:
    """What one server accepts.

    Attributes:
        duration: seconds of one clip, and of the recording of a stream.
        active: generations that take turns; waiting: generations in the queue behind them.
        per_client: generations of one address, active or waiting.
        body_bytes: of a JSON body or a message; clip_bytes: of an uploaded file; clip_seconds: of its audio.
        clips: uploaded clips kept, the oldest are dropped.
        prompt_characters: of a prompt.
        moments: snapshots kept for one listener.
        body_seconds: longest wait for the next part of a body; idle_seconds: longest pause of a listener.
    """

    duration: float = MAX_DURATION
    active: int = 4
    waiting: int = 32
    per_client: int = 8
    body_bytes: int = 64 * 1024
    clip_bytes: int = 32 * 1024 * 1024
    clip_seconds: float = 60.0
    clips: int = 16
    prompt_characters: int = 2000
    moments: int = 16
    body_seconds: float = 20.0
    idle_seconds: float = 180.0


class BodyLimit:
    """ASGI middleware: a body beyond its limit is refused while it is read (413), one that stops arriving after
    `body_seconds` (408). Neither is kept in memory."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_clip = scope["path"] == CLIPS_PATH
        limit = self._limits.clip_bytes + _ENVELOPE_BYTES if is_clip else self._limits.body_bytes
        too_large = f"the body is larger than {limit / 1e6:.3g} MB: send less"
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            await send_error(send, 413, too_large)
            return
        body = _Body(receive, send, limit, self._limits.body_seconds, too_large)
        body.is_complete = b"transfer-encoding" not in headers and declared in (b"", b"0")
        await self._app(scope, body.receive, body.send)


class _Body:
    """`receive` and `send` of one request. Reading raises once the body is too large, or late; an answer before its end
    closes the connection, so that the rest is not read."""

    def __init__(self, receive: Receive, send: Send, limit: int, seconds: float, too_large: str) -> None:
        self.is_complete = False
        self._receive, self._send = receive, send
        self._n_left, self._seconds, self._too_large = limit, seconds, too_large

    async def receive(self) -> Message:
        """The next part of the body. Raises HTTPException."""
        from starlette.exceptions import HTTPException

        try:
            message = await asyncio.wait_for(self._receive(), None if self.is_complete else self._seconds)
        except TimeoutError as error:
            raise HTTPException(408, "the body stopped arriving: send it again") from error
        self._n_left -= len(message.get("body", b""))
        if self._n_left < 0:
            raise HTTPException(413, self._too_large)
        self.is_complete = self.is_complete or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start" and not self.is_complete:
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await self._send(message)


async def send_error(send: Send, status: int, message: str) -> None:
    """Answer an HTTP request with a JSON error and close the connection."""
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
