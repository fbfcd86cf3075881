"""Classifier-free guidance (arXiv 2207.12598) with two conditions, text and coarse codes (arXiv 2211.09800, eq. 3).

    prediction = none + coarse_guidance_scale (coarse - none) + guidance_scale (coarse and text - coarse)

A dropped condition is replaced by its null: the empty caption, the learnt null vectors of the coarse latents and of the
controls, which are dropped with the text.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmttm.diffusion.samplers import Predict
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition


def guided_predictor(
    model: LatentDenoiser,
    conditions: Conditions,
    null_text: TextCondition,
    guidance_scale: float = 1.0,
    coarse_guidance_scale: float = 1.0,
) -> Predict:
    """The guided prediction for B items; all passes run in one batch.

    Args:
        null_text: the null condition, one row (shared) or B rows.
        guidance_scale: towards text and controls; 1 is the conditional pass alone, 0 the pass without them.
        coarse_guidance_scale: the same for the coarse codes.
    """
    batch = len(conditions.coarse_latents)
    null_text = TextCondition(*(tensor.expand(batch, *tensor.shape[1:]) for tensor in null_text))
    without_text = conditions.with_text(null_text).without_controls()
    weighted = [
        (conditions, guidance_scale),
        (without_text, coarse_guidance_scale - guidance_scale),
        (without_text.without_coarse(), 1 - coarse_guidance_scale),
    ]
    weighted = [(condition, weight) for condition, weight in weighted if weight]
    weights = [weight for _, weight in weighted]
    stacked = stack_conditions([condition for condition, _ in weighted])

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        n = len(weights)
        predictions = model(noisy.repeat(n, 1, 1), time.repeat(n), stacked)  # [n * B, C, T]
        if weights == [1]:
            return predictions
        return sum(weight * part for weight, part in zip(weights, predictions.chunk(n), strict=True))

    return predict


def stack_conditions(conditions: Sequence[Conditions]) -> Conditions:
    """Conditions of n passes over the same B items as one batch of n * B, which have the same controls or none of
    them; only these, text and coarse codes may differ."""
    first, n = conditions[0], len(conditions)
    given = torch.ones(len(first.coarse_latents), dtype=torch.bool, device=first.coarse_latents.device)
    texts = [condition.text for condition in conditions]

    def repeat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(n, *[1] * (tensor.ndim - 1))

    return replace(
        first,
        coarse_latents=first.coarse_latents.repeat(n, 1, 1),
        text=TextCondition.stack([text.embeddings[i, text.mask[i]] for text in texts for i in range(len(text.mask))]),
        has_coarse=torch.cat([given if c.has_coarse is None else c.has_coarse for c in conditions]),
        coarse_noise_aug=repeat(first.coarse_noise_aug),
        controls=Controls.cat([condition.controls for condition in conditions]),
        mask=repeat(first.mask),
    )
