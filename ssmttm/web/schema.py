"""What a client may send: bodies of HTTP requests and messages of a WebSocket, and how they are checked.

The classes are plain dataclasses, so that this module imports without FastAPI; pydantic, which comes with it, reads the
types and the descriptions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from ssmttm.errors import UserError
from ssmttm.generation.request import Request, Sampling
from ssmttm.web.limits import Limits

AudioFormat = Literal["wav", "flac", "mp3", "ogg"]
_STRICT = {"extra": "forbid"}  # an unknown field is an error, not ignored


def _about(text: str) -> dict[str, str]:
    return {"description": text}


@dataclass
class MusicRequest:
    """The music that is asked for; common to clips and streams."""

    __pydantic_config__ = _STRICT

    prompt: str = field(metadata=_about("What the music should be."))
    model: str | None = field(default=None, metadata=_about("A name from /v1/models; null: the first."))
    duration: float | None = field(
        default=None, metadata=_about("Seconds. Of a clip 10 by default; a stream without it does not end.")
    )
    seed: int | None = field(
        default=None, metadata=_about("The same seed gives the same music; null: a random one, which is told.")
    )
    guidance_scale: float | None = field(
        default=None, metadata=_about("1: none; higher follows the prompt more closely.")
    )
    temperature: float | None = field(
        default=None, metadata=_about("Below 1 sharper, above 1 more random; null, as of guidance_scale: the model's.")
    )
    bpm: float | None = field(default=None, metadata=_about("Beats per minute, for models trained with a tempo."))
    negative_prompt: str | None = field(
        default=None, metadata=_about("What the music should not be; takes the place of the empty caption.")
    )
    continue_from: str | None = field(default=None, metadata=_about("The id of an uploaded clip to go on from."))

    def check(self, limits: Limits) -> None:
        """Raises UserError if a value is out of its range."""
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt or "")):
            if len(text) > limits.prompt_characters:
                raise UserError(f"the {name} has {len(text)} characters: at most {limits.prompt_characters}")
        given = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
        Request.create(
            self.prompt, self.duration, self.seed or 0, sampling, limits.duration, self.bpm,
            negative_prompts=self.negative_prompt,
        )  # fmt: skip


@dataclass
class GenerateRequest(MusicRequest):
    """The body of POST /v1/generate."""

    format: AudioFormat = field(default="wav", metadata=_about("Of the audio."))
    response: Literal["audio", "json"] = field(
        default="audio",
        metadata=_about("audio: the file, with its sidecar in the header X-Sidecar; json: {audio: base64, sidecar}."),
    )


@dataclass
class StartMessage(MusicRequest):
    """Begin a stream; one under way ends."""

    type: Literal["start"] = "start"
    lead: float | None = field(
        default=None, metadata=_about("Generate at most this many seconds ahead of what `played` messages report.")
    )


@dataclass
class ChangeMessage:
    """Change what is generated from now on; fields left out stay as they are."""

    __pydantic_config__ = _STRICT

    type: Literal["change"]
    prompt: str | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    bpm: float | None = None

    def values(self) -> dict[str, Any]:
        """The fields that were given."""
        names = ("prompt", "guidance_scale", "temperature", "bpm")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class PlayedMessage:
    """How much was heard of the part of the stream since the last `started` message, which has the same epoch."""

    __pydantic_config__ = _STRICT

    type: Literal["played"]
    epoch: int
    seconds: float
    lead: float | None = None


@dataclass
class SnapshotMessage:
    """Keep the present moment, to come back to it."""

    __pydantic_config__ = _STRICT

    type: Literal["snapshot"]


@dataclass
class ResumeMessage:
    """Go back to a moment, and on from it: as before, or, with another seed, differently."""

    __pydantic_config__ = _STRICT

    type: Literal["resume"]
    moment: int
    seed: int | None = None


@dataclass
class StopMessage:
    """End the stream; its recording and moments stay until the next start."""

    __pydantic_config__ = _STRICT

    type: Literal["stop"]


MESSAGES: dict[str, type] = {
    "start": StartMessage, "change": ChangeMessage, "played": PlayedMessage, "snapshot": SnapshotMessage,
    "resume": ResumeMessage, "stop": StopMessage,
}  # fmt: skip


def parse_message(data: Any) -> Any:
    """A WebSocket message as an instance of its class in MESSAGES. Raises UserError in one line if it is none."""
    from pydantic import ValidationError

    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise UserError(f"a message must be a JSON object with a type among {', '.join(MESSAGES)}")
    try:
        return _adapters()[kind].validate_python(data)
    except ValidationError as error:
        raise UserError(one_line(error.errors(include_url=False))) from error


def one_line(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors: the field and what is wrong with it."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{place}: {first['msg']}" if place else str(first["msg"])


@cache
def _adapters() -> dict[str, Any]:
    from pydantic import TypeAdapter

    return {name: TypeAdapter(kind) for name, kind in MESSAGES.items()}
