"""MusicPipeline: prompts in, audio out.

Shapes: n prompts, S samples, K codebooks, T frames, t frames of a chunk.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from ssmttm.audio.defects import check_music
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.code_generation import Change, CodeGenerator, PipelineOutput, second_stage_inputs
from ssmttm.generation.editing.continuation import AudioInput, EncodedClip
from ssmttm.generation.editing.edits import audio_to_audio, close_loop, repaint
from ssmttm.generation.editing.loop import check_loop, decode_loop
from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.generation.engines import Engine
from ssmttm.generation.item_controls import build_controls, draw_controls
from ssmttm.generation.pretrained import PipelineParts
from ssmttm.generation.request import (
    CONTROLS,
    MusicOptions,
    Prompt,
    Request,
    bars_duration,
    blend_weights,
)
from ssmttm.generation.second_stage import SecondStage, SecondStageStream
from ssmttm.generation.streaming.session import CONTEXT_SECONDS, FADE_SECONDS, Snapshot, StreamSession
from ssmttm.generation.streaming.state import fill_state, load_snapshot, save_snapshot
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition

_log = logging.getLogger(__name__)
CLIP_SECONDS = 10.0  # of a clip, by default
_UNSET: Final[Any] = object()


class MusicPipeline(PipelineParts):
    """Prompts in, audio out: clips, streams, saved states. See `PipelineParts` for its attributes."""

    _last_session: Callable[[], StreamSession] | None = None  # that `save_state` saves

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], duration: float | Sequence[float] | None = None,
        guidance_scale: float | None = None, seeds: int | Sequence[int] = 0, temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, bpm: float | None = None, melody: Tensor | None = None,
        diffusion_steps: int | None = None, progress: Callable[[float], None] | None = None, *,
        min_p: float | None = None, negative_prompts: str | Sequence[str] | None = None, key: str | None = None,
        metre: str | None = None, bars: float | None = None, schedule: Sequence[tuple[float, Mapping[str, Any]]] = (),
        continue_from: AudioInput | None = None, loop: bool = False, engine: str = "auto", weights: str = "fp32",
    ) -> PipelineOutput:  # fmt: skip
        """Generate one clip per prompt, those of one duration in one batch. Raises UserError if one is out of range.

        Args:
            prompts: one or more captions. A mapping of captions to weights is a blend: their logits are averaged.
            duration: of each clip, in seconds (default: 10), or one per prompt: the shorter clips end in zeros, and
                `lengths` of the output has their samples.
            guidance_scale: 1 samples without guidance, higher values follow the prompt more closely; None: the model's
                (mostly 3, or 1 for a student with distilled guidance).
            seeds: one per prompt; a single number s means s, s + 1, ... The same prompt, settings and seed give the
                same clip, alone or in a batch.
            temperature, top_k, top_p, min_p: see `ssmttm.generation.request.Sampling`; None: the model's, see
                `sampling_defaults`.
            bpm: beats per minute; key: such as "D minor"; metre: such as "3/4"; melody: audio [channels, S] at
                `sample_rate` whose chroma is followed. Each needs a stage that was trained with it. A model with a
                control predictor draws those of bpm, key and metre that are not given from each caption, unless a clip
                is continued; `metadata["controls"]` of the output states them.
            bars: the duration in bars at `bpm`, of 4 beats unless there is a metre, in place of `duration`. With
                a model that was not trained with tempo or metre these are for the length only, with a warning.
            schedule: seconds of the new music and what changes there for all clips, such as
                [(10.0, {"prompt": "driving techno", "guidance_scale": 4.0})]; see `StreamSession.change`.
            diffusion_steps: sampling steps of the second stage; None: as configured at its training.
            progress: called with the seconds of audio newly sampled, over all prompts.
            negative_prompts: what to lead away from, one for all or one per prompt; it takes the place of the null
                condition, so it needs guidance.
            continue_from: audio to go on from, of at least a frame: a file, a waveform [S] or [C, S] at `sample_rate`,
                or a waveform and its rate. The output is this clip, as the codec (or the VAE) renders it, and then
                `duration` seconds of new music; a melody accompanies the new music.
            loop: the end of each clip leads into its start: its last two seconds are generated again with the start as
                what follows them.
            engine, weights: of the language model's steps, see `ssmttm.generation.engines.build`. "auto" takes the
                fastest engine that can run the model; the metadata tell which and why.
        """
        options = MusicOptions(
            duration=CLIP_SECONDS if duration is None and bars is None else duration, guidance_scale=guidance_scale,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, bpm=bpm, key=key, metre=metre, bars=bars,
            melody=melody, schedule=schedule, diffusion_steps=diffusion_steps, continue_from=continue_from,
        )  # fmt: skip
        request, second_stage, clip = self._prepare(prompts, seeds, negative_prompts, options)
        if loop:
            check_loop(request.durations or [request.duration], continue_from is not None)
            request = replace(request, is_whole=False)
        parts = []
        for items, part in request.by_duration():
            parts.append((items, self._generate(part, second_stage, clip, loop, (engine, weights), progress)))
        if len(parts) == 1:
            return parts[0][1]
        self._last_session = partial(_refuse_state, len(request.prompts))
        return PipelineOutput.merge(parts)

    def _generate(
        self, request: Request, second_stage: SecondStage | None, clip: EncodedClip | None, loop: bool,
        engine: tuple[str, str], progress: Callable[[float], None] | None,
    ) -> PipelineOutput:  # fmt: skip
        """The clips of a request of one duration, in one batch; arguments as of a call."""
        step_engine = self.engine(*engine)
        generator = self._generator(request, second_stage, clip, step_engine)
        n_clip_frames, started = generator.n_clip_frames, generator.request
        chunks: list[ClipCodes] = []
        while (chunk := generator.next_codes(math.ceil(self.codec.frame_rate / 2))) is not None:
            chunks.append(chunk)
            if progress is not None and (len(chunks) > 1 or not n_clip_frames):
                progress(len(request.prompts) * chunk.n_frames / self.codec.frame_rate)
        codes = ClipCodes.cat(chunks)
        self._last_session = lambda: self._session_after(generator.request, codes, second_stage, self.engine(*engine))
        # One item at a time, so that memory and rounding do not depend on the batch.
        n_samples, n_skipped = self._n_samples(request, clip)
        if loop:
            codes = close_loop(self, generator.request, codes, second_stage, step_engine)
            audios = torch.stack([decode_loop(self.decoder, item, n_samples) for item in codes.full.split(1)])
        else:
            decoded = (self.decode(item) for item in codes.full.split(1))
            audios = torch.cat([wav[..., n_skipped : n_skipped + n_samples] for wav in decoded])
        metadata = self.metadata_of_call(second_stage, step_engine, started)
        lengths = [audios.shape[-1]] * len(audios)
        return PipelineOutput(audios, self.sample_rate, codes.full.cpu(), metadata, lengths=lengths)

    repaint = repaint
    audio_to_audio = audio_to_audio

    def stream(
        self, prompt: Prompt, duration: float | None = _UNSET, guidance_scale: float | None = None, seed: int = 0,
        **options: Any,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Generate one clip and yield its audio while it is generated: the chunks of a `session` of these arguments.

        Args:
            duration: in seconds (default: 10, or that of `bars`); None: without an end.
            The others: as in a session.

        Returns:
            An iterator of float32 [channels, s] chunks on the CPU; concatenated they are the audio of a call.
        """
        if duration is _UNSET:
            duration = None if options.get("bars") is not None else CLIP_SECONDS
        return iter(self.session(prompt, duration=duration, guidance_scale=guidance_scale, seed=seed, **options))

    def session(
        self, prompt: Prompt, *, seed: int = 0, negative_prompt: str | None = None, chunk_seconds: float = 0.5,
        engine: str = "auto", weights: str = "fp32", **options: Any,
    ) -> StreamSession:  # fmt: skip
        """Open a stream, which may be changed while it plays, copied and saved. Raises UserError if an argument is out
        of its range, or a stream without an end is asked of a codec or a pattern that cannot stream.

        Args:
            chunk_seconds: audio sampled before each decoding; shorter chunks have less latency and cost more.
            options: those of `MusicOptions`, as in a call; without a duration, and without bars, there is no end.
            The others: as in a call.
        """
        if not (math.isfinite(chunk_seconds) and chunk_seconds > 0):
            raise UserError(f"chunk_seconds must be above 0, got {chunk_seconds}")
        request, second_stage, clip = self._prepare(prompt, [seed], negative_prompt, MusicOptions(**options))
        if request.duration is None and self.decoder.context is None:
            raise UserError(f"the {self.decoder.title} decodes whole clips only: give a duration")
        generator = self._generator(request, second_stage, clip, self.engine(engine, weights))
        chunk_frames = math.ceil(chunk_seconds * self.codec.frame_rate)
        n_samples, n_skipped = self._n_samples(request, clip)
        n_total = None if request.duration is None else n_samples
        session = StreamSession(self, generator, chunk_frames, n_total, n_skipped)
        self._last_session = lambda: session
        return session

    def _prepare(
        self, prompts: Prompt | Sequence[Prompt], seeds: int | Sequence[int],
        negative_prompts: str | Sequence[str] | None, options: MusicOptions,
    ) -> tuple[Request, SecondStage | None, EncodedClip | None]:  # fmt: skip
        """The checked request, the second stage with its number of steps, and the clip that is continued."""
        duration, bpm, metre = options.duration, options.bpm, options.metre
        if options.bars is not None:
            duration, bpm, metre = self._bars(options.bars, duration, bpm, metre)
        request = Request.create(
            prompts, duration, seeds, self.sampling(**options.sampling), self.max_duration, bpm, options.melody,
            negative_prompts, options.key, metre, options.schedule,
        )  # fmt: skip
        second_stage = self.check_request(request, options.diffusion_steps)
        source = options.continue_from
        return request, second_stage, None if source is None else self.encode_clip(source)

    def resume(self, snapshot: Snapshot, seed: int | None = None) -> StreamSession:
        """Go on from a moment of a stream, at no cost of prefill: exactly as that stream did, or with another seed.
        Raises UserError if it is of another pipeline."""
        if snapshot.session.pipeline is not self:
            raise UserError("the snapshot is of another pipeline: resume it there, or save and load its state")
        snapshot.session.check_weights()
        return snapshot.session.clone(seed)

    def save_state(self, path: str | Path, session: StreamSession | Snapshot | None = None) -> Path:
        """Write a moment of a stream to a safetensors file, with the hashes of the models.

        Args:
            session: None: the last session or stream that was opened, as it is now, or the end of the last call's clip
                (of one prompt).

        Raises:
            UserError: there is none, it has ended, or it is of another pipeline.
        """
        if session is None:
            if self._last_session is None:
                raise UserError("there is no state to save: open a session, or generate one clip")
            session = self._last_session()
        snapshot = session if isinstance(session, Snapshot) else session.snapshot()
        if snapshot.session.pipeline is not self:
            raise UserError("the session is of another pipeline: save its state there")
        if snapshot.session.finished:
            raise UserError("the stream has ended, so its state leads nowhere: save it before its end")
        snapshot.session.check_weights()
        return save_snapshot(path, snapshot, self)

    def load_state(self, path: str | Path) -> Snapshot:
        """Read a moment that `save_state` wrote, for `resume`. Raises UserError if the file is damaged, or of another
        model."""
        return load_snapshot(path, self)

    def restored_session(self, request: Request, content: dict[str, Any]) -> StreamSession:
        """The session of a saved state; see `ssmttm.generation.streaming.state`."""
        second_stage = self.check_request(request, content["diffusion_steps"])
        state = content["session"]
        generator = self._generator(request, second_stage, None, self.engine(*content["engine"]), draws=False)
        saved = state["generator"]
        generator.schedule = self.scheduled_changes(
            request, saved["n_clip_frames"], saved["sampler"]["n_frames"], saved["n_scheduled"]
        )
        session = StreamSession(self, generator, state["chunk_frames"], state["n_samples"])
        session.restore(state, fill_state)
        generator.set_controls(self.controls(request, generator.n_clip_frames, generator.sampler.n_frames))
        return session

    def text_conditions(self, request: Request) -> TextConditions:
        """The captions of a request and their null conditions, encoded one by one: rounding in an encoder depends on
        the batch."""
        blends = [blend_weights(prompt) for prompt in request.prompts]
        longest = max(map(len, blends))
        prompts, weights, nulls = [], [], []
        for blend, negative in zip(blends, request.negative_prompts, strict=True):
            encoded = [self._encode_caption(text) for text in blend]
            n_missing = longest - len(blend)  # filled with the first one, at a weight of 0
            prompts.append([text for text, _ in encoded] + [encoded[0][0]] * n_missing)
            weights.append([*blend.values(), *[0.0] * n_missing])
            nulls.append(self._encode_caption(negative)[0] if negative else encoded[0][1])
        texts = [TextCondition.stack(texts) for texts in zip(*prompts, strict=True)]
        return TextConditions(texts, TextCondition.stack(nulls), torch.tensor(weights).T if longest > 1 else None)

    def change(
        self, request: Request, changes: Mapping[str, Any], n_clip_frames: int, n_frames: int | None, frame: int = 0
    ) -> Change:
        """A change of a request's words or settings from a frame on. Raises UserError if a value is out of its range,
        or the model was not trained with a control."""
        changed = request.changed(**changes)
        self.check_controls(changed)
        new_words = not changes.keys().isdisjoint({"prompt", "negative_prompt"})
        conditions = self.text_conditions(changed) if new_words else None
        new_controls = not changes.keys().isdisjoint(CONTROLS)
        if conditions is not None and "prompt" in changes and changed.drawn is not None:
            changed, new_controls = self._draw_controls(changed, conditions), True
        return Change(
            changed, conditions, changed.sampling,
            self.controls(changed, n_clip_frames, n_frames) if new_controls else None,
            round(FADE_SECONDS * self.codec.frame_rate), frame,
        )  # fmt: skip

    def scheduled_changes(
        self, request: Request, n_clip_frames: int, n_frames: int | None, n_pending: int
    ) -> list[Change]:
        """The last `n_pending` changes of a request's schedule, which counts from the end of the clip before it. What
        they do not name stays as it is in the request."""
        schedule, current = [], request
        for seconds, changes in request.schedule[len(request.schedule) - n_pending :]:
            frame = n_clip_frames + round(seconds * self.codec.frame_rate)
            schedule.append(self.change(current, changes, n_clip_frames, n_frames, frame))
            current = schedule[-1].request
        return schedule

    def controls(self, request: Request, n_clip_frames: int = 0, n_frames: int | None = None) -> Controls:
        """The request's controls for every item, by frame; see `build_controls`."""
        return build_controls(request, self.decoder, next(self.model.parameters()).device, n_clip_frames, n_frames)

    def _draw_controls(self, request: Request, conditions: TextConditions) -> Request:
        """The request with the controls that this model draws from the captions; of a blend, its heaviest one."""
        predictor = self.model.control_predictor
        return request if predictor is None else draw_controls(predictor, request, conditions.heaviest_text())

    def check_controls(self, request: Request) -> None:
        """Raises UserError if no stage was trained with one of the request's controls, or a negative prompt has no
        guidance to act through."""
        scale = request.sampling.guidance_scale
        in_second = self.second_stage is not None and self.second_stage.settings.guidance_scale > 1
        if any(request.negative_prompts) and (scale < 1.0 or (scale == 1.0 and not in_second)):
            found = "1 (none)" if scale == 1.0 else f"{scale:g} (towards the negative prompt)"
            raise UserError(f"a negative prompt acts through guidance, which is {found}: give a guidance above 1")
        for name, key in (("bpm", "tempo"), ("melody", "chroma"), ("key", "key"), ("metre", "metre")):
            if getattr(request, name) is not None and not self.supports(key):
                raise UserError(f"this model was not trained with {name} (model.{key}=true): leave it out")

    def _bars(
        self, bars: float, duration: Any, bpm: float | None, metre: str | None
    ) -> tuple[float, float | None, str | None]:
        """The duration of a number of bars, and tempo and metre if the model was trained with them. Raises UserError if
        there is a duration too."""
        if duration is not None:
            raise UserError("bars and a duration are two lengths: give one of them")
        duration = bars_duration(bars, bpm, metre)
        if not self.supports("tempo"):
            _log.warning("this model was not trained with tempo: bpm gives the length of %g bars only", bars)
        known = (bpm if self.supports("tempo") else None), ((metre or "4/4") if self.supports("metre") else None)
        return duration, *known

    def check_request(self, request: Request, diffusion_steps: int | None) -> SecondStage | None:
        """Check that the model supports the request's controls; the second stage with its number of steps. Raises
        UserError as `check_controls`, or if diffusion steps are given for a one-stage model."""
        self.check_controls(request)
        if request.melody is not None:  # the part that is followed
            used = request.melody
            if request.duration is not None:
                used = used[:, : self._n_samples(request, None)[0]]
            check_music(used, self.sample_rate, f"the melody of {used.shape[-1] / self.sample_rate:.2f} s")
        if diffusion_steps is None:
            return self.second_stage
        if self.second_stage is None:
            raise UserError("this model has one stage: diffusion steps are for two-stage models")
        return self.second_stage.with_steps(diffusion_steps)

    def _generator(
        self, request: Request, second_stage: SecondStage | None, clip: EncodedClip | None, engine: Engine,
        draws: bool = True,
    ) -> CodeGenerator:  # fmt: skip
        """Both stages, ready to generate the request's clips after the clip that they continue. With `draws`, controls
        are drawn from the captions, unless there is a clip, which has a tempo and a key of its own."""
        n_items = len(request.prompts)
        codes = None if clip is None else clip.codes.expand(n_items)
        n_clip_frames = 0 if codes is None else codes.n_frames
        n_frames = None
        if request.duration is not None:
            n_frames = n_clip_frames + math.ceil(self._n_samples(request, None)[0] / self.decoder.hop_length)
        conditions = self.text_conditions(request)
        if draws and clip is None:
            request = self._draw_controls(request, conditions)
        controls = self.controls(request, n_clip_frames, n_frames)
        schedule = self.scheduled_changes(request, n_clip_frames, n_frames, len(request.schedule))
        sampler = CodeSampler(
            self.model, conditions, self.pattern, n_frames, request.sampling, request.seeds,
            None if codes is None else codes.coarse,
            controls.supported_by(self.model.config), math.ceil(CONTEXT_SECONDS * self.codec.frame_rate), engine,
        )  # fmt: skip
        if second_stage is None:
            return CodeGenerator(request, sampler, None, codes, schedule)
        own = controls.supported_by(second_stage.model.config)
        inputs = second_stage_inputs(conditions, request.seeds, own, sampler.device)
        second = SecondStageStream(second_stage, inputs, codes)
        return CodeGenerator(request, sampler, second, codes, schedule)

    def _session_after(
        self, request: Request, codes: ClipCodes, second_stage: SecondStage | None, engine: Engine
    ) -> StreamSession:
        """A session without an end that goes on from the end of the clip of these codes."""
        if (n_clips := len(codes.full)) > 1:
            _refuse_state(n_clips)
        request = replace(request, duration=None, schedule=())
        n_samples = codes.n_frames * self.decoder.hop_length
        clip = EncodedClip(codes, torch.zeros(1, n_samples), 0)  # of which only the codes are used
        generator = self._generator(request, second_stage, clip, engine)
        return StreamSession(self, generator, math.ceil(self.codec.frame_rate / 2), None, n_samples)

    def _n_samples(self, request: Request, clip: EncodedClip | None) -> tuple[int, int]:
        """Samples of each clip (of the clip that is continued, if there is no end), and those decoded before them."""
        new = 0 if request.duration is None else max(1, round(request.duration * self.sample_rate))
        return (new, 0) if clip is None else (clip.n_samples + new, clip.n_padding)


def _refuse_state(n_clips: int) -> NoReturn:
    raise UserError(f"the last call made {n_clips} clips: a state is of one, so call with one prompt")
