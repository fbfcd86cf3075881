"""A stream in progress: audio chunk by chunk, whose words and settings may change while it plays.

It holds all that the next sample depends on: the state of the language model, the position in the codebook pattern, the
random generator, the window of the second stage, the codes that the decoder still needs. A snapshot is a copy of these,
so it costs no prefill to go on from it, and memory does not grow with the time played.
Shapes: K codebooks, C channels, s samples of a chunk.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssmttm.codecs.autoencoder import DecodeStream
from ssmttm.errors import UserError
from ssmttm.generation.code_generation import CodeGenerator
from ssmttm.generation.item_controls import describe_controls
from ssmttm.generation.request import Prompt, Request, check_seed
from ssmttm.models.token_lm import LMState

if TYPE_CHECKING:
    from ssmttm.generation.pipeline import MusicPipeline

CONTEXT_SECONDS = 4.0  # of codes that are processed again with new words
FADE_SECONDS = 0.25  # in which the new words take over
_SAVED = ("n_returned", "chunk_frames", "n_samples", "n_skipped", "finished")


@dataclass(frozen=True)
class Snapshot:
    """A moment of a stream, to go on from: see `MusicPipeline.resume` and `save_state`."""

    session: "StreamSession"  # a copy, never read from

    @property
    def position(self) -> float:
        """Seconds of audio returned before this moment."""
        return self.session.position


class StreamSession:
    """Made by `MusicPipeline.session`. Iterating yields its chunks.

    Nothing runs between two calls of `next_chunk`: a listener that stops reading costs nothing.

    Attributes:
        sample_rate: in Hz. channels: C.
    """

    def __init__(
        self, pipeline: "MusicPipeline", generator: CodeGenerator, chunk_frames: int, n_samples: int | None,
        n_skipped: int = 0,
    ) -> None:  # fmt: skip
        """`n_samples`: of the whole clip, None without an end; `n_skipped`: of its first samples, not returned."""
        self.pipeline, self.generator = pipeline, generator
        self.sample_rate: int = pipeline.sample_rate
        self.channels = pipeline.decoder.channels
        self.n_returned = 0  # samples
        self.chunk_frames, self.n_samples, self.n_skipped = chunk_frames, n_samples, n_skipped
        self.decoder = DecodeStream(pipeline.decoder)
        self.finished = False
        self._weights = pipeline.weights_in_use()

    @property
    def request(self) -> Request:
        """The prompt and the settings as they are now."""
        return self.generator.request

    @property
    def controls(self) -> dict[str, Any]:
        """Tempo, key and metre as they are now, and the names of those that were drawn from the caption; empty if the
        model draws none."""
        found = describe_controls(self.request)
        return found[0] if found else {}

    @property
    def position(self) -> float:
        """Seconds of audio returned so far."""
        return self.n_returned / self.sample_rate

    def next_chunk(self) -> Tensor | None:
        """The next audio, float32 [C, s] on the CPU, or None after the end. Raises UserError if the model's output is
        not finite, or as `check_weights`."""
        self.check_weights()
        while not self.finished:
            codes = self.generator.next_codes(self.chunk_frames)
            if codes is None:
                self.finished = True
                wav = self.decoder.finish()
            else:
                wav = self.decoder.push(codes.full)
            if wav is not None and (chunk := self._trim(wav[0].float().cpu())).shape[-1]:
                self.n_returned += chunk.shape[-1]
                return chunk
        return None

    def check_weights(self) -> None:
        """Raises UserError if the pipeline has other adapters, or another dtype or device, than when this stream was
        opened: its state is of those weights. It goes on once they are back."""
        if self._weights != self.pipeline.weights_in_use():
            raise UserError(
                "the adapters, the dtype or the device of the pipeline changed while this stream was open: restore "
                "them, or open another session"
            )

    def __iter__(self) -> Iterator[Tensor]:
        while (chunk := self.next_chunk()) is not None:
            yield chunk

    def change(
        self, *, prompt: Prompt | None = None, negative_prompt: str | None = None,
        guidance_scale: float | None = None, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, bpm: float | None = None, key: str | None = None,
        metre: str | None = None,
    ) -> None:  # fmt: skip
        """Change the words or the settings; heard within a second of audio (in a two-stage model, from the next window
        on). What is not given stays. Before the first chunk it is as if the session had begun with these.

        New words: the last seconds of codes are processed again with them, and they take over in a quarter of a second.

        Raises:
            UserError: a value is out of its range, the model was not trained with a control, the stream has ended, or
                as `check_weights`.
        """
        self.check_weights()
        given = {
            "prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "bpm": bpm, "key": key,
            "metre": metre,
        }  # fmt: skip
        if self.finished:
            raise UserError("the stream has ended: nothing is left to change; open another session")
        changes = {name: value for name, value in given.items() if value is not None}
        if changes:
            pipeline, generator = self.pipeline, self.generator
            frames = generator.n_clip_frames, generator.sampler.n_frames
            generator.change(pipeline.change(self.request, changes, *frames))
            generator.schedule = pipeline.scheduled_changes(self.request, *frames, len(generator.schedule))

    def snapshot(self) -> Snapshot:
        """This moment, to come back to; costs a copy of the state."""
        return Snapshot(self.clone())

    def clone(self, seed: int | None = None) -> "StreamSession":
        """A stream that goes on from here independently: exactly as this one does, or with another seed."""
        if seed is not None:
            check_seed(seed)
        new = copy.copy(self)
        new.generator = self.generator.clone(None if seed is None else [seed])
        new.decoder = self.decoder.clone()
        return new

    def state(self) -> dict[str, Any]:
        """All that the next chunk depends on besides the models and the request, as plain values and tensors."""
        own = {name: getattr(self, name) for name in _SAVED}
        decoder = {name: getattr(self.decoder, name) for name in ("buffer", "first", "start")}
        return own | {"decoder": decoder, "generator": self.generator.state()}

    def restore(self, state: dict[str, Any], fill: Callable[[LMState, Any], LMState]) -> None:
        """Take the `state` of a session of the same models and request; see `CodeSampler.restore`."""
        for name in _SAVED:
            setattr(self, name, state[name])
        buffer = state["decoder"]["buffer"]
        self.decoder.first, self.decoder.start = state["decoder"]["first"], state["decoder"]["start"]
        self.decoder.buffer = None if buffer is None else buffer.to(self.generator.sampler.device)
        self.generator.restore(state["generator"], fill)

    def _trim(self, wav: Tensor) -> Tensor:
        """Without the samples before the clip's start and after its end."""
        skipped = min(self.n_skipped, wav.shape[-1])
        self.n_skipped -= skipped
        wav = wav[:, skipped:]
        return wav if self.n_samples is None else wav[:, : self.n_samples - self.n_returned]
