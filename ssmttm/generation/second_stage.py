"""The second stage at work: sketches, the codes of the first codebooks, completed to all codebooks by a denoiser.

Long pieces go window by window. A window begins with frames of the one before, given to it as known at every step, so
that both match at the seam; it needs no more than its own frames, so a piece can be painted while it is being written.
Shapes: B items, n codebooks of the sketch, K codebooks, T frames, t frames of a chunk, C channels that are found.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.codecs import Codec
from ssmttm.diffusion.guidance import guided
from ssmttm.diffusion.samplers import SamplerSettings, sample
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition


@dataclass(frozen=True)
class SecondStageConfig:
    """How a sketch is painted.

    Attributes:
        sampler: scheduler and steps.
        guidance_scale: towards the text; 1: as trained.
        coarse_guidance_scale: towards the sketch; 1: as trained.
        window, overlap: frames of a window, and how many of them it shares with the one before.

    Raises:
        UserError: a window that is no longer than its overlap, or a scale that is no number of at least 0.
    """

    sampler: SamplerSettings
    guidance_scale: float = 1.0
    coarse_guidance_scale: float = 1.0
    window: int = 250
    overlap: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.window:
            raise UserError(f"windows of {self.window} frames cannot overlap by {self.overlap}: choose fewer")
        for name in ("guidance_scale", "coarse_guidance_scale"):
            scale = getattr(self, name)
            if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
                raise UserError(f"diffusion.{name} is {scale}: give 0 or more (1 means no guidance)")

    @classmethod
    def of(cls, config: Any) -> "SecondStageConfig":
        """Those that a training's config asks for; a window is as long as what it was trained on."""
        settings, window = config.diffusion, config.data.frames
        sampler = SamplerSettings(settings.objective, settings.sampler, settings.steps)
        return cls(sampler, settings.guidance_scale, settings.coarse_guidance_scale, window, window // 5)


@dataclass(frozen=True)
class SecondStageInputs:
    """What B items are to become, besides their sketches.

    Attributes:
        text: B captions. null_text: the null condition, one row (shared) or B rows.
        seeds: one an item, on which, with its sketch and its brief, its codes alone depend.
        wishes: of B items, for a denoiser that was trained with them; a melody may be shorter than the piece.
    """

    text: TextCondition
    null_text: TextCondition
    seeds: Sequence[int]
    controls: Controls = field(default_factory=Controls)

    def rows(self, rows: slice) -> "SecondStageInputs":
        """That of some of the items."""

        def of(text: TextCondition) -> TextCondition:
            return text if len(text.mask) == 1 else TextCondition(*(part[rows] for part in text))

        return SecondStageInputs(of(self.text), of(self.null_text), self.seeds[rows], self.controls.rows(rows))

    def window(self, index: int, start: int, length: int) -> "SecondStageInputs":
        """That of the frames from `start` on, with seeds of its own; NaN behind the melody's end."""
        seeds = [np.random.SeedSequence([seed, index]).generate_state(1).item() for seed in self.seeds]
        return replace(self, seeds=seeds, controls=self.controls.at(torch.arange(start, start + length)))


class SecondStage:
    """A denoiser with its codec."""

    def __init__(self, model: LatentDenoiser, codec: Codec, settings: SecondStageConfig) -> None:
        self.model, self.codec, self.settings = model, codec, settings

    def generate(self, coarse_codes: Tensor, inputs: SecondStageInputs) -> Tensor:
        """Complete sketches, codes [B, n, T] -> int64 [B, K, T], whose first n codebooks are the sketch.

        Raises:
            UserError: sizes do not fit, or the denoiser's numbers are not finite.
        """
        return torch.cat(list(self.generate_stream([coarse_codes], inputs)), -1)

    def generate_stream(self, chunks: Iterable[Tensor], inputs: SecondStageInputs) -> Iterator[Tensor]:
        """Complete sketches as they come, chunks [B, n, t]; what is given out, joined, is `paint` of them joined.

        Yields:
            codes [B, K, t'], a window's new frames.
        """
        window, overlap = self.settings.window, self.settings.overlap
        held: Tensor | None = None  # the sketch from the window's first frame on
        known: Tensor | None = None  # codes [B, K, overlap] of the window before
        index = 0
        for chunk in chunks:
            held = chunk if held is None else torch.cat([held, chunk], -1)
            while held.shape[-1] > window:  # there is more than this window, so its end is no end of the piece
                codes = self._window(held[..., :window], known, inputs, index)
                yield codes[..., 0 if known is None else overlap :]
                held, known, index = held[..., window - overlap :], codes[..., window - overlap :], index + 1
        if held is None:
            raise UserError("there is no sketch to paint")
        codes = self._window(held, known, inputs, index)
        yield codes[..., 0 if known is None else overlap :]

    def _window(self, coarse_codes: Tensor, known: Tensor | None, inputs: SecondStageInputs, index: int) -> Tensor:
        """Codes [B, K, T] of one window. On a CPU items go one by one: so their rounding does not depend on others."""
        start = index * (self.settings.window - self.settings.overlap)
        inputs = inputs.window(index, start, coarse_codes.shape[-1])
        size = 1 if coarse_codes.device.type == "cpu" else len(coarse_codes)
        items = [slice(first, first + size) for first in range(0, len(coarse_codes), size)]
        return torch.cat([self._rows(coarse_codes[i], None if known is None else known[i], inputs.rows(i)) for i in items])

    @torch.inference_mode()
    def _rows(self, coarse_codes: Tensor, known: Tensor | None, inputs: SecondStageInputs) -> Tensor:
        config, (batch, n_sketch, length) = self.model.config, coarse_codes.shape
        if n_sketch != config.n_coarse_codebooks:
            raise UserError(f"the sketch has {n_sketch} codebooks, the denoiser is told {config.n_coarse_codebooks}")
        unknown = coarse_codes.new_zeros(batch, config.n_codebooks - n_sketch, length)
        told = self.codec.to_latents(torch.cat([coarse_codes, unknown], 1))[:, : config.coarse_channels]  # [B, S, T]
        generators = [torch.Generator().manual_seed(seed) for seed in inputs.seeds]
        noise = torch.stack([torch.randn(length, config.noisy_channels, generator=g).T for g in generators])
        conditions = Conditions(self.model.normalised(told), inputs.text, controls=inputs.controls)
        scales = self.settings.guidance_scale, self.settings.coarse_guidance_scale
        predict = guided(self.model, conditions, inputs.null_text, *scales)
        if known is not None:
            known = self.codec.to_latents(known)[:, config.coarse_channels :]
            known = self.model.normalised(known, first=n_sketch)
        found = sample(predict, self.settings.sampler, noise.to(coarse_codes.device), generators, known)  # [B, C, T]
        if not bool(found.isfinite().all()):
            raise UserError("the denoiser gives numbers that are not finite (damaged or diverged): try an earlier one")
        found = self.model.denormalised(found, first=n_sketch)
        return torch.cat([coarse_codes, self.codec.from_latents(torch.cat([told, found], 1))[:, n_sketch:]], 1)
