"""The second stage: a denoiser that predicts all codebooks from the first few (coarse codes), window by window.

Consecutive windows overlap: the shared frames are known to the sampler at every step, so that windows join without a
seam. A window needs its own frames only, so the second stage runs while the first one still generates.

A denoiser of a VAE's latents gives patches of these, float [B, C, T], wherever "codes" are said to be generated here.
Shapes: B items, N coarse codebooks, K codebooks, T frames, t frames of a chunk, C sampled latent channels.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.codecs import Autoencoder, Codec
from ssmttm.diffusion.guidance import guided_predictor
from ssmttm.diffusion.samplers import SamplerSettings, sample
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.engines.sequences import compiled_sequences
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition

if TYPE_CHECKING:
    from ssmttm.codecs.vae import PatchedVAE


@dataclass(frozen=True)
class SecondStageConfig:
    """Sampling settings of the second stage. Raises UserError if the overlap is not shorter than the window, or a scale
    is below 0 or not finite.

    Attributes:
        sampler: scheduler and steps.
        guidance_scale: towards the text. coarse_guidance_scale: towards the coarse codes. 1: no guidance.
        window, overlap: frames of a window, and frames shared with the one before.
    """

    sampler: SamplerSettings
    guidance_scale: float = 1.0
    coarse_guidance_scale: float = 1.0
    window: int = 250
    overlap: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.window:
            raise UserError(f"the overlap of windows must be in [0, {self.window - 1}] frames, got {self.overlap}")
        for name in ("guidance_scale", "coarse_guidance_scale"):
            scale = getattr(self, name)
            if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
                raise UserError(f"diffusion.{name} must be at least 0 (1: no guidance), got {scale}")

    @classmethod
    def from_config(cls, config: Any) -> "SecondStageConfig":
        """The settings in a training config; windows have the length of the training crops."""
        diffusion, window = config.diffusion, config.data.frames
        sampler = SamplerSettings(diffusion.objective, diffusion.sampler, diffusion.steps)
        return cls(sampler, diffusion.guidance_scale, diffusion.coarse_guidance_scale, window, window // 5)


@dataclass(frozen=True)
class SecondStageInputs:
    """Conditions of B items besides their coarse codes.

    Attributes:
        text: B captions. null_text: the null condition, one row (shared) or B rows.
        seeds: one per item; an item's codes depend on its own inputs and seed only.
        controls: for a denoiser trained with them; a melody may be shorter than the clip.
    """

    text: TextCondition
    null_text: TextCondition
    seeds: Sequence[int]
    controls: Controls = field(default_factory=Controls)

    def select_rows(self, rows: slice) -> "SecondStageInputs":
        """Inputs of some of the items."""
        null_text = self.null_text if len(self.null_text.mask) == 1 else _select_rows(self.null_text, rows)
        text = self.text if len(self.text.mask) == 1 else _select_rows(self.text, rows)
        return SecondStageInputs(text, null_text, self.seeds[rows], self.controls.select_rows(rows))

    def select_window(self, index: int, start: int, length: int) -> "SecondStageInputs":
        """Inputs of a window: its own seeds, and the melody from frame `start` on (NaN after the melody's end)."""
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1).item() for seed in self.seeds]
        return replace(self, seeds=seeds, controls=self.controls.gather_frames(torch.arange(start, start + length)))


class SecondStage:
    """A denoiser with its codec, the VAE whose latents it generates, if it does, and sampling settings."""

    def __init__(
        self, model: LatentDenoiser, codec: Codec, settings: SecondStageConfig, vae: "PatchedVAE | None" = None
    ) -> None:
        self.model, self.codec, self.settings, self.vae = model, codec, settings, vae

    @property
    def decoder(self) -> Autoencoder:
        """What decodes the frames that are generated."""
        return self.codec if self.vae is None else self.vae

    def with_steps(self, steps: int) -> "SecondStage":
        """The same with another number of sampling steps. Raises UserError if the number is out of range."""
        sampler = replace(self.settings.sampler, steps=steps)
        return SecondStage(self.model, self.codec, replace(self.settings, sampler=sampler), self.vae)

    def generate(self, coarse_codes: Tensor, inputs: SecondStageInputs) -> Tensor:
        """Coarse codes [B, N, T] -> all codes, int64 [B, K, T]; the first N codebooks are the coarse codes. Raises
        UserError if sizes do not fit, or the denoiser's output is not finite."""
        return torch.cat(list(self.generate_stream([coarse_codes], inputs)), -1)

    def generate_stream(self, chunks: Iterable[Tensor], inputs: SecondStageInputs) -> Iterator[Tensor]:
        """`generate` for coarse codes that arrive in chunks [B, N, t]; the result does not depend on the chunks.

        Yields:
            codes [B, K, t'], the new frames of a window.
        """
        stream = SecondStageStream(self, inputs)
        for chunk in chunks:
            yield from (codes.full for codes in stream.push(chunk))
        yield stream.finish().full

    def regenerate(
        self, codes: ClipCodes, region: tuple[int, int], inputs: SecondStageInputs, strength: float = 1.0
    ) -> ClipCodes:
        """Generate the frames `region` (start, stop) again from their coarse codes; the frames around them are known to
        the sampler (inpainting) and stay as they are. Raises UserError as `diffusion.samplers.sample`.

        Args:
            codes: B clips; in the region only the coarse codes are used, unless the strength is below 1.
            strength: below 1, sampling starts from the codes that are there.
        """
        window, overlap = self.settings.window, self.settings.overlap
        full, (done, stop), index = codes.full.clone(), region, 0
        while done < stop:
            first = max(0, done - overlap)
            frames = slice(first, min(first + window, codes.n_frames, stop + overlap))
            n_after = max(0, frames.stop - stop)
            known = full[..., first:done] if done > first else None
            after = full[..., stop : frames.stop] if n_after else None
            original = full[..., frames] if strength < 1 else None
            made = self.generate_window(
                codes.coarse[..., frames], known, inputs, index, first - index * (window - overlap), after, original,
                strength,
            )  # fmt: skip
            end = frames.stop - n_after
            full[..., done:end] = made[..., done - first : end - first]
            done, index = end, index + 1
        return ClipCodes(codes.coarse, full)

    def generate_window(
        self, coarse_codes: Tensor, known: Tensor | None, inputs: SecondStageInputs, index: int, first_frame: int = 0,
        known_after: Tensor | None = None, original: Tensor | None = None, strength: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Codes [B, K, T] of window `index`, of which window 0 begins at `first_frame`. On a CPU one item at a time, so
        that rounding does not depend on the batch.

        Args:
            known, known_after: codes [B, K, P] and [B, K, Q] of its first and last frames.
            original: codes [B, K, T] that sampling starts from at a `strength` below 1.
        """
        start = first_frame + index * (self.settings.window - self.settings.overlap)
        inputs = inputs.select_window(index, start, coarse_codes.shape[-1])
        size = 1 if coarse_codes.device.type == "cpu" else len(coarse_codes)
        codes = []
        for first in range(0, len(coarse_codes), size):
            rows = slice(first, first + size)
            given = [None if tensor is None else tensor[rows] for tensor in (known, known_after, original)]
            codes.append(self._generate_batch(coarse_codes[rows], given, inputs.select_rows(rows), strength))
        return torch.cat(codes)

    @torch.inference_mode()
    def _generate_batch(
        self, coarse_codes: Tensor, given: Sequence[Tensor | None], inputs: SecondStageInputs, strength: float
    ) -> Tensor:
        """`given`: codes of the first frames, of the last frames, and of all frames to start from."""
        config, (batch, n_coarse, length) = self.model.config, coarse_codes.shape
        if n_coarse != config.n_coarse_codebooks:
            raise UserError(f"the denoiser expects {config.n_coarse_codebooks} coarse codebooks, got {n_coarse}")
        unknown = coarse_codes.new_zeros(batch, config.n_codebooks - n_coarse, length)
        latents = self.codec.to_latents(torch.cat([coarse_codes, unknown], 1))  # [B, C', T]
        coarse_latents = latents[:, : config.coarse_channels]
        generators = [torch.Generator().manual_seed(seed) for seed in inputs.seeds]
        noise = torch.stack([torch.randn(length, config.noisy_channels, generator=g).T for g in generators])
        conditions = Conditions(self.model.normalise(coarse_latents), inputs.text, controls=inputs.controls)
        scales = self.settings.guidance_scale, self.settings.coarse_guidance_scale
        predict = guided_predictor(self.model, conditions, inputs.null_text, *scales)
        known, after, original = (None if codes is None else self._fine_latents(codes) for codes in given)
        noise = noise.to(coarse_codes.device)
        with compiled_sequences(coarse_codes.device):
            sampled = sample(predict, self.settings.sampler, noise, generators, known, after, original, strength)
        if not bool(sampled.isfinite().all()):
            raise UserError("the denoiser's output is not finite (damaged or diverged): try an earlier checkpoint")
        sampled = self.model.denormalise(sampled, first=n_coarse)  # [B, C, T]
        if self.vae is not None:
            return sampled
        codes = self.codec.from_latents(torch.cat([coarse_latents, sampled], 1))
        return torch.cat([coarse_codes, codes[:, n_coarse:]], 1)

    def _fine_latents(self, codes: Tensor) -> Tensor:
        """Normalised latents [B, C, T] that the denoiser generates: of codes [B, K, T], or of a VAE's patches."""
        config = self.model.config
        if self.vae is not None:
            return self.model.normalise(codes, first=config.n_coarse_codebooks)
        latents = self.codec.to_latents(codes)[:, config.coarse_channels :]
        return self.model.normalise(latents, first=config.n_coarse_codebooks)


class SecondStageStream:
    """A second stage in progress: `SecondStage.generate_stream`, one chunk at a time.

    Attributes:
        inputs: of the windows to come; may be replaced.
    """

    def __init__(self, stage: SecondStage, inputs: SecondStageInputs, clip: ClipCodes | None = None) -> None:
        """`clip`: codes before the first chunk, of which the last `overlap` frames are known to the first window."""
        self.stage, self.inputs = stage, inputs
        self.index = 0  # of the next window
        self.coarse_codes: Tensor | None = None  # [B, N, t] from the next window's first frame on
        self.known: Tensor | None = None  # codes [B, K, t] that the next window begins with
        self.first_frame = 0 if clip is None else clip.n_frames  # of window 0
        if clip is not None and stage.settings.overlap:
            last = clip.frames(-stage.settings.overlap)
            self.coarse_codes, self.known = last.coarse, last.full
            self.first_frame -= last.n_frames

    def push(self, chunk: Tensor) -> list[ClipCodes]:
        """Coarse codes [B, N, t] -> the codes of the new frames of each window that the clip does not end with."""
        window, overlap = self.stage.settings.window, self.stage.settings.overlap
        coarse_codes = chunk if self.coarse_codes is None else torch.cat([self.coarse_codes, chunk], -1)
        new = []
        while coarse_codes.shape[-1] > window:
            codes, n_known = self._generate_window(coarse_codes[..., :window])
            new.append(codes.frames(n_known))
            coarse_codes, self.known = coarse_codes[..., window - overlap :], codes.full[..., window - overlap :]
            self.index += 1
        self.coarse_codes = coarse_codes
        return new

    def finish(self) -> ClipCodes:
        """The codes of the new frames of the last window. Raises UserError without coarse codes."""
        if self.coarse_codes is None:
            raise UserError("the second stage got no coarse codes")
        codes, n_known = self._generate_window(self.coarse_codes)
        return codes.frames(n_known)

    def clone(self) -> "SecondStageStream":
        """A copy that goes on independently."""
        return copy.copy(self)  # its tensors are replaced, not changed in place

    def state(self) -> dict[str, Any]:
        """All that the next window depends on besides the denoiser and `inputs`."""
        return {name: getattr(self, name) for name in ("index", "first_frame", "coarse_codes", "known")}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the `state` of a stream of the same denoiser."""
        device = next(self.stage.model.parameters()).device
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)

    def _generate_window(self, coarse_codes: Tensor) -> tuple[ClipCodes, int]:
        """The codes of the next window, and how many of its frames were known."""
        full = self.stage.generate_window(coarse_codes, self.known, self.inputs, self.index, self.first_frame)
        return ClipCodes(coarse_codes, full), 0 if self.known is None else self.known.shape[-1]


def _select_rows(text: TextCondition, rows: slice) -> TextCondition:
    return TextCondition(text.embeddings[rows], text.mask[rows])
