"""What the scheduler runs: a whole clip for POST /v1/generate, a stream for the WebSocket."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ssmttm.errors import UserError
from ssmttm.web.recording import Branch, Recording, to_int16

if TYPE_CHECKING:
    from ssmttm.generation.streaming.session import StreamSession

_UNSENT_SECONDS = 1.0  # generated ahead of the network
_MAX_COMMANDS = 16  # that wait for the next chunk


class ClipGeneration:
    """A whole clip; see `ssmttm.web.scheduler.Generation`.

    Attributes:
        audio: int16 [S, C], once all of it is generated; or HTTPException.
        controls: that the model drew from the prompt, see `StreamSession.controls`.
    """

    def __init__(self, client: str, open_session: "Callable[[], StreamSession]") -> None:
        self.client = client
        self.audio: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._open = open_session
        self._session: StreamSession | None = None
        self._chunks: list[np.ndarray] = []
        self.controls: dict[str, Any] = {}

    def ready(self) -> bool:
        """Always: the whole clip is wanted."""
        return True

    def turn(self) -> bool:
        """Open the session, or generate a chunk."""
        if self._session is None:
            self._session = self._open()
            self.controls = self._session.controls
            return True
        chunk = self._session.next_chunk()
        if chunk is not None:
            self._chunks.append(to_int16(chunk))
            return True
        self._settle(self.audio.set_result, np.concatenate(self._chunks))
        return False

    def queued(self, position: int) -> None:
        """Nothing: an HTTP answer has no place for it; GET /v1/status tells the length of the queue."""

    def failed(self, message: str, status: int) -> None:
        """Hand the error to the route."""
        from starlette.exceptions import HTTPException

        self._settle(self.audio.set_exception, HTTPException(status, message))

    def _settle(self, settle: Callable[..., None], value: object) -> None:
        """Set the future in its own thread, unless its request is gone."""
        loop = self.audio.get_loop()
        loop.call_soon_threadsafe(lambda: None if self.audio.done() else settle(value))


@dataclass(frozen=True)
class Moment:
    """A point to come back to: the state of the session, its time in seconds, and what led to it."""

    snapshot: Any
    position: float
    branch: Branch


@dataclass(frozen=True)
class AudioChunk:
    """int16 samples, interleaved, and their number."""

    pcm: bytes
    n_samples: int


Event: TypeAlias = "dict[str, Any] | AudioChunk | Moment"


class StreamGeneration:
    """A stream, generated no further ahead than is wanted; see `ssmttm.web.scheduler.Generation`.

    Attributes:
        sent: samples that the network took.
        played: seconds that were heard; None until they are reported.
        lead: seconds to generate ahead of `played`; None: as fast as the network takes them.
    """

    def __init__(
        self, client: str, open_session: "Callable[[], StreamSession]", recording: Recording,
        post: Callable[[Event], None], position: float = 0.0, lead: float | None = None,
    ) -> None:  # fmt: skip
        self.client = client
        self.sent = 0
        self.played = 0.0
        self.lead = lead
        self._open = open_session
        self._recording = recording
        self._post = post
        self._start = position
        self._generated = 0  # samples
        self._session: StreamSession | None = None
        self._commands: deque[dict[str, Any] | None] = deque()  # changed values; None: a snapshot
        self._place = 0  # in the queue

    @property
    def position(self) -> float:
        """Seconds of music up to the newest sample."""
        return self._start + self._generated / self._recording.sample_rate

    @property
    def is_open(self) -> bool:
        """Whether its music has begun, that is, it is not waiting in the queue."""
        return self._session is not None

    def ready(self) -> bool:
        """Whether there is a command, or the listener will need audio soon."""
        return self._session is None or bool(self._commands) or self._wants_audio()

    def turn(self) -> bool:
        """Open the session, apply commands, generate a chunk."""
        if self._session is None:
            self._session = self._open()
            return True
        while self._commands:
            self._apply(self._session, self._commands.popleft())
        if not self._wants_audio():
            return True
        chunk = self._session.next_chunk()
        if chunk is None:
            self._post({"type": "finished", "position": self.position})
            return False
        samples = to_int16(chunk)  # [S, C]
        if self._generated == 0:
            drawn = _drawn_controls(self._session)
            self._post({"type": "started", "channels": samples.shape[1], "position": self._start, **drawn})
            if self._start == 0:
                self._recording.describe(drawn)
        was_full = self._recording.is_full
        self._recording.append(samples)
        self._generated += len(samples)
        self._post(AudioChunk(samples.tobytes(), len(samples)))
        if self._recording.is_full and not was_full:
            self._post({"type": "recording_full", "position": self.position})
        return True

    def change(self, values: dict[str, Any]) -> None:
        """Change prompt, guidance or controls from the next chunk on. Raises UserError as `snapshot`."""
        if self._commands and self._commands[-1] is not None:
            self._commands[-1] = {**self._commands[-1], **values}
        else:
            self._command(values)

    def snapshot(self) -> None:
        """Post the present moment. Raises UserError if too many commands wait for the next chunk."""
        self._command(None)

    def queued(self, position: int) -> None:
        """Tell the listener its place in the queue."""
        if position != self._place:
            self._place = position
            self._post({"type": "queued", "position": position})

    def failed(self, message: str, status: int) -> None:
        """Tell the listener why the music ended."""
        self._post({"type": "error", "message": message})

    def _wants_audio(self) -> bool:
        rate = self._recording.sample_rate
        if self._generated - self.sent > _UNSENT_SECONDS * rate:
            return False
        return self.lead is None or self._generated < (self.played + self.lead) * rate

    def _command(self, values: dict[str, Any] | None) -> None:
        if len(self._commands) >= _MAX_COMMANDS:
            raise UserError("too many messages at once: send fewer")
        self._commands.append(values)

    def _apply(self, session: "StreamSession", values: dict[str, Any] | None) -> None:
        """Change values, or take a snapshot. What is not possible leaves the music as it is."""
        if values is None:
            self._post(Moment(session.snapshot(), self.position, self._recording.branch.copy()))
            return
        try:
            session.change(**values)
        except UserError as error:
            self._post({"type": "refused", "message": " ".join(str(error).split())})
            return
        about = {"position": self.position, **values, **_drawn_controls(session)}
        self._recording.branch.history.append(about)
        self._post({"type": "changed", **about})


def _drawn_controls(session: "StreamSession") -> dict[str, Any]:
    """As `controls`, tempo, key and metre of a model that draws them from the prompt."""
    return {"controls": session.controls} if session.controls else {}
