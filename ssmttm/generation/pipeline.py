"""MusicPipeline: prompts in, audio out.

Shapes: n prompts, S samples, K codebooks, T frames, t frames of a chunk.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm import __version__
from ssmttm.audio.features import frame_chroma
from ssmttm.codecs import Codec, load_codec
from ssmttm.errors import UserError
from ssmttm.files import file_sha256
from ssmttm.generation.engine import generate_frames
from ssmttm.generation.loading import (
    GUIDANCE_SCALE,
    check_fit,
    load_denoiser,
    load_model,
    open_model_folder,
    open_second_stage_folder,
)
from ssmttm.generation.request import MAX_DURATION, Request, Sampling
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models.controls import Controls, SupportsControls
from ssmttm.models.token_lm import TokenLM
from ssmttm.patterns import Pattern, get_pattern
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import build_null_condition


@dataclass(frozen=True)
class PipelineOutput:
    """What was made.

    Attributes:
        audios: float32 [n, channels, S] on the CPU, S = round(duration * sample_rate).
        sample_rate: in Hz.
        codes: int64 [n, K, T] on the CPU.
    """

    audios: Tensor
    sample_rate: int
    codes: Tensor


class MusicPipeline:
    """A language model, its codec and its text encoder, ready to sample; with two stages, also what paints its sketch.

    Attributes:
        facts: where the model comes from, for the record beside each file: model and weights hash, codec, text encoder,
            licences of the training data, software.
        painter: the second stage, or None.
        max_duration: longest piece that a call accepts, in seconds; set it higher for longer pieces.

    `reading` is what the model reads of a caption, see `ssmttm.text.null_condition`; `guidance_scale` what a call uses that
    asks for none.
    """

    def __init__(
        self,
        model: TokenLM,
        codec: Codec,
        text_encoder: TextEncoder,
        pattern: Pattern,
        facts: dict[str, Any] | None = None,
        max_duration: float = MAX_DURATION,
        null_condition: str = "empty_caption",
        second_stage: SecondStage | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> None:
        self.model = model.eval()
        self.guidance_scale = guidance_scale
        self.second_stage = second_stage
        self.codec = codec.eval()
        self.text_encoder = text_encoder
        self.pattern = pattern
        self.facts = facts or {}
        self.max_duration = max_duration
        self._read = build_null_condition(null_condition, text_encoder)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path | None = None,
        device: str | torch.device | None = None,
        codec: str | Path | None = None,
        text_encoder: str | Path | None = None,
        second_stage: str | Path | None = None,
    ) -> "MusicPipeline":
        """Load a model with the codec and text encoder that it was trained with; EMA weights where there are any.

        Args:
            folder_or_hub_id: an exported model, a checkpoint, a run folder (its newest good checkpoint), or the id of
                an exported model on the Hugging Face hub. None: the embedded tiny model.
            device: where the model and the codec run; default a GPU if there is one.
            codec, text_encoder: where to load these from if not by the name in the model's card, such as a folder. They
                must be the very ones all the same.
            painter: the second stage of a model of two, if it is not in the model's folder: a run, a checkpoint or an
                exported denoiser.

        Raises:
            UserError: nothing is there, a file is damaged, or model, codec and text encoder do not belong together.
        """
        folder = open_model_folder(folder_or_hub_id)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_model(folder)
        second = open_second_stage_folder(folder, second_stage)
        denoiser = None if second is None else load_denoiser(second).to(device)
        n_codebooks = (model if denoiser is None else denoiser).config.n_codebooks
        its_codec = load_codec(codec or folder.source("codec"), n_codebooks).to(device)
        its_encoder = load_text_encoder(text_encoder or folder.source("text"))
        check_fit(folder, model, its_codec, its_encoder, denoiser)
        facts = {
            "model": {"name": folder.name, "weights_sha256": file_sha256(folder.weights_file)},
            "codec": {"name": its_codec.name, "fingerprint": its_codec.fingerprint},
            "text_encoder": {"name": its_encoder.name, "fingerprint": its_encoder.fingerprint},
            "training_data_licences": folder.licences,
            "software": f"ssmttm {__version__}",
        }
        its_second_stage = None
        if second is not None:
            settings = SecondStageConfig.of(second.config)
            its_second_stage = SecondStage(denoiser, its_codec, settings)
            facts["second_stage"] = {
                "name": second.name,
                "weights_sha256": file_sha256(second.weights_file),
                "sampler": settings.sampler.name,
                "steps": settings.sampler.steps,
                "guidance_scale": settings.guidance_scale,
                "coarse_guidance_scale": settings.coarse_guidance_scale,
            }
            facts["training_data_licences"] = (folder.licences or {}) | (second.licences or {})
        pattern = get_pattern(folder.config.pattern, n_codebooks=model.config.n_codebooks)
        return cls(
            model.to(device), its_codec, its_encoder, pattern, facts, null_condition=folder.null_condition, second_stage=its_second_stage,
            guidance_scale=folder.guidance_scale,
        )  # fmt: skip

    def set_diffusion_steps(self, steps: int) -> None:
        """Sampler steps of the second stage from now on.

        Raises:
            UserError: fewer than one, or the model has one stage only.
        """
        if self.second_stage is None:
            raise UserError("this model has one stage: there are no steps to set")
        settings = self.second_stage.settings
        self.second_stage.settings = replace(settings, sampler=replace(settings.sampler, steps=steps))
        self.facts.setdefault("second_stage", {})["steps"] = steps

    @property
    def sample_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.codec.sample_rate

    def __call__(
        self,
        prompts: str | Sequence[str],
        duration: float = 10.0,
        guidance_scale: float | None = None,
        seeds: int | Sequence[int] = 0,
        temperature: float = 1.0,
        top_k: int = 250,
        top_p: float = 1.0,
        tempo: float | None = None,
        melody: Tensor | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> PipelineOutput:
        """Make one piece for each prompt, all in one batch.

        Args:
            prompts: one or more descriptions in words.
            duration: of each piece, in seconds.
            guidance_scale: 1 follows the model as it is, higher values follow the prompt more closely; None: the
                model's own, 3, or 1 for a student distilled with its teacher's guidance within.
            seeds: one a prompt; a single number s means s, s + 1, ... The same prompt, settings and seed give the same
                piece, alone or in a batch.
            temperature, top_k, top_p: see `ssmttm.generation.request.Sampling`.
            tempo: beats a minute; melody: audio [channels, S] at `sample_rate` whose pitch classes to take up. Both are
                for models, of one stage or two, of which a stage was trained with them.
            progress: called with the seconds of audio newly sampled, over all prompts.

        Raises:
            UserError: an argument is out of its range.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        sampling = Sampling(temperature, top_k, top_p, guidance_scale)
        request = Request.checked(prompts, duration, seeds, sampling, self.max_duration)
        request = self._with_controls(request, tempo, melody)
        chunks = []
        for chunk in self._frames(request, chunk_frames=math.ceil(self.codec.frame_rate / 2)):
            chunks.append(chunk)
            if progress is not None:
                progress(chunk.shape[0] * chunk.shape[-1] / self.codec.frame_rate)
        codes = torch.cat(chunks, dim=-1)
        audios = torch.cat([self._decode(item, self._samples(request)) for item in codes.split(1)])
        return PipelineOutput(audios, self.sample_rate, codes.cpu())

    def stream(
        self,
        prompt: str,
        duration: float = 10.0,
        guidance_scale: float | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 250,
        top_p: float = 1.0,
        tempo: float | None = None,
        melody: Tensor | None = None,
        chunk_seconds: float = 0.5,
    ) -> Iterator[Tensor]:
        """Make one piece and hand it over while it is being made.

        Args:
            chunk_seconds: how much is sampled before each decoding; shorter chunks come sooner and cost more.
            The others: as for a call.

        Returns:
            An iterator of float32 [channels, s] chunks on the CPU; joined they are the audio of the whole call.

        Raises:
            UserError: an argument is out of its range (at once, before the first chunk is asked for).
        """
        if not (math.isfinite(chunk_seconds) and chunk_seconds > 0):
            raise UserError(f"chunk_seconds is {chunk_seconds}: give a number of seconds above 0")
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        sampling = Sampling(temperature, top_k, top_p, guidance_scale)
        request = Request.checked([prompt], duration, [seed], sampling, self.max_duration)
        request = self._with_controls(request, tempo, melody)
        frames = self._frames(request, chunk_frames=math.ceil(chunk_seconds * self.codec.frame_rate))
        return self._stream(frames, self._samples(request))

    def _with_controls(self, request: Request, tempo: float | None, melody: Tensor | None) -> Request:
        """The request with tempo and melody, if there is a stage that hears them.

        Raises:
            UserError: there is none, or they are no tempo and no audio.
        """
        stages: list[SupportsControls] = [self.model.config] + ([] if self.second_stage is None else [self.second_stage.model.config])
        for name, given in (("tempo", tempo), ("melody", melody)):
            part = "chroma" if name == "melody" else name
            if given is not None and not any(getattr(config, part) for config in stages):
                raise UserError(f"this model was not trained with a {name}: leave it out (one trained with model."
                                f"{part}=true takes it)")  # fmt: skip
        if tempo is not None and not (math.isfinite(tempo) and tempo > 0):
            raise UserError(f"tempo is {tempo}: give beats a minute, above 0")
        if melody is not None and (melody.ndim != 2 or not melody.numel() or not bool(melody.isfinite().all())):
            raise UserError(f"the melody has the shape {list(melody.shape)}: give finite audio [channels, samples]")
        return replace(request, tempo=tempo, melody=melody)

    def _stream(self, frames: Iterator[Tensor], n_samples: int) -> Iterator[Tensor]:
        for wav in self.codec.decode_stream(frames):
            wav = wav[0, :, :n_samples].float().cpu()
            n_samples -= wav.shape[-1]
            if wav.shape[-1]:
                yield wav

    @torch.inference_mode()
    def _decode(self, codes: Tensor, n_samples: int) -> Tensor:
        """One item at a time: the memory of a batch's decoding is that of one piece, and so is its rounding."""
        return self.codec.decode(codes)[..., :n_samples].float().cpu()

    def _frames(self, request: Request, chunk_frames: int) -> Iterator[Tensor]:
        n_frames = math.ceil(self._samples(request) / self.codec.hop_length)
        text, null_text = self._encode(request.prompts)
        controls = self._controls(request, n_frames)
        frames = generate_frames(
            self.model,
            text,
            null_text,
            self.pattern,
            n_frames,
            request.sampling,
            request.seeds,
            chunk_frames=chunk_frames,
            controls=controls.supported_by(self.model.config),
        )
        if self.second_stage is None:
            return frames
        device, embeddings = next(self.model.parameters()).device, controls.supported_by(self.second_stage.model.config)
        return self.second_stage.generate_stream(frames, SecondStageInputs(text.to(device), null_text.to(device), request.seeds, embeddings))

    def _controls(self, request: Request, n_frames: int) -> Controls:
        """What each item is told; a melody longer than the piece is cut, and a shorter one ends before it."""
        device, items = next(self.model.parameters()).device, len(request.prompts)
        tempo = None if request.tempo is None else torch.full((items,), request.tempo, device=device)
        chroma = None
        if request.melody is not None:
            frames = min(n_frames, math.ceil(request.melody.shape[-1] / self.codec.hop_length))
            wav = request.melody.mean(0, keepdim=True)[:, : frames * self.codec.hop_length].to(device)
            chroma = frame_chroma(wav, self.sample_rate, frames).expand(items, -1, -1)
        return Controls(chroma, tempo)

    def _encode(self, prompts: list[str]) -> tuple[TextCondition, TextCondition]:
        """Captions and their null conditions, each read by itself: in a batch an encoder rounds otherwise."""
        texts, nulls = zip(*map(self._read, prompts), strict=True)
        return TextCondition.stack(texts), TextCondition.stack(nulls)

    def _samples(self, request: Request) -> int:
        return max(1, round(request.duration * self.sample_rate))
