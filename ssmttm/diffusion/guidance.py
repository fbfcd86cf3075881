"""Guidance (arXiv 2207.12598) by two conditions, text and sketch (arXiv 2211.09800, equation 3).

    prediction = none + coarse_guidance_scale (sketch - none) + guidance_scale (sketch and text - sketch)

Every pass that is to know nothing of a condition is given its null: the empty caption, the learnt null sketch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmttm.diffusion.samplers import Predict
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition


def guided(
    model: LatentDenoiser,
    conditions: Conditions,
    null_text: TextCondition,
    guidance_scale: float = 1.0,
    coarse_guidance_scale: float = 1.0,
) -> Predict:
    """The model under conditions of B items, all passes in one batch.

    Args:
        null_text: the null condition, one row (shared) or B rows.
        guidance_scale: 1 is the conditional pass as it is, 0 the pass under the null condition.
        coarse_guidance_scale: the same for the sketch.
    """
    batch = len(conditions.coarse_codes)
    without_text = conditions.with_text(_rows(null_text, batch))
    passes, weights = [], []
    for part, weight in (
        (conditions, guidance_scale),
        (without_text, coarse_guidance_scale - guidance_scale),
        (without_text.without_coarse(), 1 - coarse_guidance_scale),
    ):
        if weight:
            passes.append(part)
            weights.append(weight)
    stacked = stack(passes)

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        n = len(passes)
        told = model(noisy.repeat(n, 1, 1), time.repeat(n), stacked)  # [n * B, C, T]
        if weights == [1]:
            return told
        return sum(weight * part for weight, part in zip(weights, told.chunk(n), strict=True))

    return predict


def stack(parts: Sequence[Conditions]) -> Conditions:
    """Conditions of several passes over the same items, one below the other."""
    first, n = parts[0], len(parts)
    here = [torch.ones(len(p.coarse_codes), dtype=torch.bool, device=p.coarse_codes.device) for p in parts]
    has_coarse = [yes if p.has_coarse is None else p.has_coarse for p, yes in zip(parts, here, strict=True)]

    def again(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.repeat(n, *[1] * (value.ndim - 1))

    return replace(
        first,
        coarse_codes=again(first.coarse_codes),
        text=_joined([p.text for p in parts]),
        has_coarse=torch.cat(has_coarse),
        coarse_noise_aug=again(first.coarse_noise_aug),
        controls=first.controls.repeat(n),
        mask=again(first.mask),
    )


def _joined(texts: Sequence[TextCondition]) -> TextCondition:
    rows = [text.embeddings[i, text.mask[i]] for text in texts for i in range(len(text.mask))]
    return TextCondition.stack(rows)


def _rows(text: TextCondition, batch: int) -> TextCondition:
    return TextCondition(*(part.expand(batch, *part.shape[1:]) for part in text))
