"""What the routes of the server share: the models, the worker thread, uploaded clips and recordings."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ssmttm.errors import UserError
from ssmttm.generation.output import sidecar
from ssmttm.generation.request import MAX_SEED
from ssmttm.web.clips import Clips
from ssmttm.web.limits import Limits
from ssmttm.web.recording import Recording
from ssmttm.web.scheduler import Scheduler
from ssmttm.web.schema import MusicRequest

if TYPE_CHECKING:
    from ssmttm.generation.pipeline import MusicPipeline
    from ssmttm.generation.streaming.session import StreamSession

CHUNK_SECONDS = 0.25  # sampled in one turn


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        model: its name.
        seed: of the request, or a random one.
        sidecar: the metadata of its audio.
        open: opens its session; for the worker thread.
    """

    pipe: "MusicPipeline"
    model: str
    seed: int
    sidecar: dict[str, Any]
    open: "Callable[[], StreamSession]"


class Service:
    """The parts of one server; `close` it at the end.

    Attributes:
        recordings: of the open streams, by an id that cannot be guessed.
    """

    def __init__(self, pipelines: "Mapping[str, MusicPipeline]", limits: Limits) -> None:
        self.pipelines = dict(pipelines)
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.clips = Clips(limits)
        self.recordings: dict[str, Recording] = {}

    def model_name(self, name: str | None) -> str:
        """The name of a model; None: of the first. Raises UserError if there is none."""
        if name is None:
            return next(iter(self.pipelines))
        if name not in self.pipelines:
            raise UserError(f"there is no model {name!r}: choose from {', '.join(self.pipelines)}")
        return name

    def plan(self, request: MusicRequest) -> Plan:
        """Check a request as far as that needs no model. Raises UserError if a value is out of range, or there is no
        such model or clip."""
        request.check(self.limits)
        model = self.model_name(request.model)
        pipe = self.pipelines[model]
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        clip = None if request.continue_from is None else self.clips.get(request.continue_from)
        sampling = asdict(pipe.sampling(guidance_scale=request.guidance_scale, temperature=request.temperature))
        named = replace(request, continue_from=None if clip is None else clip.name)
        settings = {item.name: getattr(named, item.name) for item in fields(MusicRequest)} | sampling
        settings = {name: value for name, value in settings.items() if value is not None}
        for name in ("prompt", "seed", "model"):
            settings.pop(name, None)
        content = sidecar(request.prompt, seed, {**settings, "sample_rate": pipe.sample_rate}, pipe.metadata)

        audio = None if clip is None else (clip.wav, clip.sample_rate)

        def open_session() -> "StreamSession":
            return pipe.session(
                request.prompt, seed=seed, duration=request.duration, bpm=request.bpm,
                negative_prompt=request.negative_prompt, continue_from=audio, chunk_seconds=CHUNK_SECONDS, **sampling,
            )  # fmt: skip

        return Plan(pipe, model, seed, content, open_session)

    def close(self) -> None:
        """End all generations."""
        self.scheduler.close()
