"""MusicPipeline: prompts in, audio out.

Shapes: n prompts, S samples, K codebooks, T frames, t frames of a chunk.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm import __version__
from ssmttm.audio.defects import check_music
from ssmttm.audio.features import frame_chroma
from ssmttm.codecs import Codec, load_codec
from ssmttm.errors import UserError
from ssmttm.files import file_sha256
from ssmttm.generation import loading
from ssmttm.generation.engine import generate_frames
from ssmttm.generation.loading import GUIDANCE_SCALE, ModelFolder
from ssmttm.generation.request import MAX_DURATION, Request, Sampling
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.hub import commit_of
from ssmttm.models.controls import Controls, SupportsControls
from ssmttm.models.token_lm import TokenLM
from ssmttm.patterns import Pattern, get_pattern
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import build_null_condition


@dataclass(frozen=True)
class PipelineOutput:
    """Generated clips.

    Attributes:
        audios: float32 [n, channels, S] on the CPU, S = round(duration * sample_rate).
        sample_rate: in Hz.
        codes: int64 [n, K, T] on the CPU.
        metadata: the pipeline's metadata, with the diffusion steps of this call.
    """

    audios: Tensor
    sample_rate: int
    codes: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)


class MusicPipeline:
    """A language model, its codec, its text encoder and, in a two-stage model, the second stage.

    Attributes:
        metadata: model and weights hash, codec, text encoder, licences of the training data, software: what goes into
            the sidecar of each audio file.
        second_stage: None for a one-stage model.
        guidance_scale: the default of a call.
        max_duration: longest clip that a call accepts, in seconds; may be raised.
    """

    def __init__(
        self, model: TokenLM, codec: Codec, text_encoder: TextEncoder, pattern: Pattern,
        metadata: dict[str, Any] | None = None, max_duration: float = MAX_DURATION,
        null_condition: str = "empty_caption", second_stage: SecondStage | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> None:  # fmt: skip
        self.model = model.eval()
        self.codec = codec.eval()
        self.text_encoder = text_encoder
        self.pattern = pattern
        self.metadata = metadata or {}
        self.max_duration = max_duration
        self.second_stage = second_stage
        self.guidance_scale = guidance_scale
        self._encode_caption = build_null_condition(null_condition, text_encoder)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path | None = None, device: str | torch.device | None = None,
        codec: str | Path | None = None, text_encoder: str | Path | None = None,
        second_stage: str | Path | None = None, revision: str | None = None,
    ) -> "MusicPipeline":  # fmt: skip
        """Load a model, with EMA weights if there are any, and the codec and text encoder that it was trained with.
        Raises UserError if nothing is there, a file is damaged, or model, codec and text encoder do not belong
        together.

        Args:
            folder_or_hub_id: an exported model, a checkpoint, a run folder (its newest good checkpoint), or the id of
                an exported model on the Hugging Face hub. None: the embedded tiny model.
            device: of the model and the codec; default a GPU if there is one.
            codec, text_encoder: where to load these from, such as a folder, if not by the name in the model's card.
                Their fingerprints must match.
            second_stage: a run, a checkpoint or an exported denoiser, if it is not in the model's folder.
            revision: branch, tag or commit of a hub id, which may also end in @ and the revision.
        """
        folder = loading.open_model_folder(folder_or_hub_id, revision=revision)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = loading.load_language_model(folder)
        second_folder = loading.open_second_stage_folder(folder, second_stage)
        denoiser = None if second_folder is None else loading.load_denoiser(second_folder).to(device)
        n_codebooks = (model if denoiser is None else denoiser).config.n_codebooks
        loaded_codec = load_codec(codec or folder.source("codec"), n_codebooks).to(device)
        loaded_encoder = load_text_encoder(text_encoder or folder.source("text"))
        loading.check_fit(folder, model, loaded_codec, loaded_encoder, denoiser)
        stage = None
        if second_folder is not None and denoiser is not None:
            stage = SecondStage(denoiser, loaded_codec, SecondStageConfig.from_config(second_folder.config))
        return cls(
            model.to(device), loaded_codec, loaded_encoder,
            get_pattern(folder.config.pattern, n_codebooks=model.config.n_codebooks),
            _metadata(folder, loaded_codec, loaded_encoder, second_folder, stage),
            null_condition=folder.null_condition, second_stage=stage, guidance_scale=folder.guidance_scale,
        )  # fmt: skip

    @property
    def sample_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.codec.sample_rate

    def __call__(
        self, prompts: str | Sequence[str], duration: float = 10.0, guidance_scale: float | None = None,
        seeds: int | Sequence[int] = 0, temperature: float = 1.0, top_k: int = 250, top_p: float = 1.0,
        tempo: float | None = None, melody: Tensor | None = None, diffusion_steps: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> PipelineOutput:  # fmt: skip
        """Generate one clip per prompt, all in one batch. Raises UserError if an argument is out of its range.

        Args:
            prompts: one or more captions.
            duration: of each clip, in seconds.
            guidance_scale: 1 samples without guidance, higher values follow the prompt more closely; None: the model's
                default, 3, or 1 for a student with distilled guidance.
            seeds: one per prompt; a single number s means s, s + 1, ... The same prompt, settings and seed give the
                same clip, alone or in a batch.
            temperature, top_k, top_p: see `ssmttm.generation.request.Sampling`.
            tempo: beats per minute; melody: audio [channels, S] at `sample_rate` whose chroma is followed. Each needs a
                stage that was trained with it.
            diffusion_steps: sampling steps of the second stage; None: as configured at its training.
            progress: called with the seconds of audio newly sampled, over all prompts.
        """
        sampling = self._sampling(temperature, top_k, top_p, guidance_scale)
        request = Request.create(prompts, duration, seeds, sampling, self.max_duration, tempo, melody)
        second_stage = self._check_request(request, diffusion_steps)
        chunks = []
        for chunk in self._frames(request, math.ceil(self.codec.frame_rate / 2), second_stage):
            chunks.append(chunk)
            if progress is not None:
                progress(chunk.shape[0] * chunk.shape[-1] / self.codec.frame_rate)
        codes = torch.cat(chunks, dim=-1)
        # One item at a time, so that memory and rounding do not depend on the batch.
        audios = torch.cat([self._decode(item, self._n_samples(request)) for item in codes.split(1)])
        metadata = dict(self.metadata)
        if second_stage is not None:
            metadata["second_stage"] = metadata.get("second_stage", {}) | {"steps": second_stage.settings.sampler.steps}
        return PipelineOutput(audios, self.sample_rate, codes.cpu(), metadata)

    def stream(
        self, prompt: str, duration: float = 10.0, guidance_scale: float | None = None, seed: int = 0,
        temperature: float = 1.0, top_k: int = 250, top_p: float = 1.0, tempo: float | None = None,
        melody: Tensor | None = None, diffusion_steps: int | None = None, chunk_seconds: float = 0.5,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Generate one clip and yield its audio while it is generated. Raises UserError if an argument is out of its
        range (at once, before the first chunk).

        Args:
            chunk_seconds: audio sampled before each decoding; shorter chunks have less latency and cost more.
            The others: as in a call.

        Returns:
            An iterator of float32 [channels, s] chunks on the CPU; concatenated they are the audio of a call.
        """
        if not (math.isfinite(chunk_seconds) and chunk_seconds > 0):
            raise UserError(f"chunk_seconds must be above 0, got {chunk_seconds}")
        sampling = self._sampling(temperature, top_k, top_p, guidance_scale)
        request = Request.create([prompt], duration, [seed], sampling, self.max_duration, tempo, melody)
        second_stage = self._check_request(request, diffusion_steps)
        frames = self._frames(request, math.ceil(chunk_seconds * self.codec.frame_rate), second_stage)
        return self._decode_stream(frames, self._n_samples(request))

    def _sampling(self, temperature: float, top_k: int, top_p: float, guidance_scale: float | None) -> Sampling:
        return Sampling(temperature, top_k, top_p, self.guidance_scale if guidance_scale is None else guidance_scale)

    def _check_request(self, request: Request, diffusion_steps: int | None) -> SecondStage | None:
        """Check that the model supports the request's controls; the second stage with its number of steps. Raises
        UserError if no stage was trained with a control, or diffusion steps for a one-stage model."""
        stages: list[SupportsControls] = [self.model.config]
        if self.second_stage is not None:
            stages.append(self.second_stage.model.config)
        for name, key, value in (("tempo", "tempo", request.tempo), ("melody", "chroma", request.melody)):
            if value is not None and not any(getattr(config, key) for config in stages):
                raise UserError(f"this model was not trained with a {name} (model.{key}=true): leave it out")
        if request.melody is not None:  # the part that is followed
            used = request.melody[:, : self._n_samples(request)]
            check_music(used, self.sample_rate, f"the melody of {used.shape[-1] / self.sample_rate:.2f} s")
        if diffusion_steps is None:
            return self.second_stage
        if self.second_stage is None:
            raise UserError("this model has one stage: diffusion steps are for two-stage models")
        return self.second_stage.with_steps(diffusion_steps)

    def _frames(self, request: Request, chunk_frames: int, second_stage: SecondStage | None) -> Iterator[Tensor]:
        """Codes [n, K, t] of the first stage, or of the second if there is one."""
        n_frames = math.ceil(self._n_samples(request) / self.codec.hop_length)
        text, null_text = self._encode(request.prompts)
        controls = self._controls(request, n_frames)
        frames = generate_frames(
            self.model, text, null_text, self.pattern, n_frames, request.sampling, request.seeds,
            chunk_frames=chunk_frames, controls=controls.supported_by(self.model.config),
        )  # fmt: skip
        if second_stage is None:
            return frames
        device = next(self.model.parameters()).device
        controls = controls.supported_by(second_stage.model.config)
        inputs = SecondStageInputs(text.to(device), null_text.to(device), request.seeds, controls)
        return second_stage.generate_stream(frames, inputs)

    def _controls(self, request: Request, n_frames: int) -> Controls:
        """The request's controls for every item; a melody longer than the clip is cut, a shorter one ends early."""
        device, n_items = next(self.model.parameters()).device, len(request.prompts)
        tempo = None if request.tempo is None else torch.full((n_items,), request.tempo, device=device)
        chroma = None
        if request.melody is not None:
            melody_frames = min(n_frames, math.ceil(request.melody.shape[-1] / self.codec.hop_length))
            wav = request.melody.mean(0, keepdim=True)[:, : melody_frames * self.codec.hop_length].to(device)
            chroma = frame_chroma(wav, self.sample_rate, melody_frames).expand(n_items, -1, -1)
        return Controls(chroma, tempo)

    def _encode(self, prompts: list[str]) -> tuple[TextCondition, TextCondition]:
        """Captions and their null conditions, encoded one by one: rounding in an encoder depends on the batch."""
        texts, nulls = zip(*map(self._encode_caption, prompts), strict=True)
        return TextCondition.stack(texts), TextCondition.stack(nulls)

    @torch.inference_mode()
    def _decode(self, codes: Tensor, n_samples: int) -> Tensor:
        return self.codec.decode(codes)[..., :n_samples].float().cpu()

    def _decode_stream(self, frames: Iterator[Tensor], n_samples: int) -> Iterator[Tensor]:
        for wav in self.codec.decode_stream(frames):
            wav = wav[0, :, :n_samples].float().cpu()
            n_samples -= wav.shape[-1]
            if wav.shape[-1]:
                yield wav

    def _n_samples(self, request: Request) -> int:
        return max(1, round(request.duration * self.sample_rate))


def _metadata(
    folder: ModelFolder, codec: Codec, text_encoder: TextEncoder, second_folder: ModelFolder | None,
    second_stage: SecondStage | None,
) -> dict[str, Any]:  # fmt: skip
    metadata: dict[str, Any] = {
        "model": {"name": folder.name, "weights_sha256": file_sha256(folder.weights_file)},
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
        "training_data_licences": folder.licences, "software": f"ssmttm {__version__}",
    }  # fmt: skip
    if commit := commit_of(folder.path):
        metadata["model"]["revision"] = commit
    if second_folder is not None and second_stage is not None:
        settings = second_stage.settings
        metadata["training_data_licences"] = (folder.licences or {}) | (second_folder.licences or {})
        metadata["second_stage"] = {
            "name": second_folder.name, "weights_sha256": file_sha256(second_folder.weights_file),
            "sampler": settings.sampler.name, "steps": settings.sampler.steps,
            "guidance_scale": settings.guidance_scale, "coarse_guidance_scale": settings.coarse_guidance_scale,
        }  # fmt: skip
    return metadata
