"""Regeneration of a region of a clip: candidates, and the one that the music after it follows best.

The state at the region's start is computed once; every candidate is a fork of it with its own seed. The codes after the
region are known: where a pattern places them before the region's last codes, they are the model's input. A candidate's
score is the mean log-likelihood that the model then gives to the codes after the region.
Shapes: K codebooks, T frames, S positions, n candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.generation.editing.continuation import EncodedClip
from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import TokenLM
from ssmttm.patterns import Pattern

SCORED_SECONDS = 3.0  # of the music after the region
CONTEXT_SECONDS = 10.0  # before it, for the score
_FADE_FRAMES = 2  # in which the clip and the new audio are mixed, outside the region and within the codec's reach


@dataclass(frozen=True)
class Repainted:
    """codes: of the first stage, [1, K, T]. scores: of each candidate, nats per code; None where nothing follows."""

    codes: Tensor
    best: int
    scores: list[float | None]


def region_frames(region: tuple[float, float], clip: EncodedClip, sample_rate: int, hop: int) -> tuple[int, int]:
    """The frames (start, stop) that hold a region in seconds of a clip. Raises UserError if it is not inside it."""
    start, stop = region
    seconds = clip.n_samples / sample_rate
    if not 0 <= start < stop or not stop <= seconds + 1 / sample_rate:
        raise UserError(f"the region {start:g}:{stop:g} s must be within the clip of {seconds:.2f} s, its start first")
    first = int(start * sample_rate + clip.n_padding) // hop
    return first, min(-int(-(stop * sample_rate + clip.n_padding) // hop), clip.codes.n_frames)


def repaint_codes(
    sampler: CodeSampler, codes: Tensor, frames: tuple[int, int], seeds: list[int], frame_rate: float
) -> Repainted:
    """Regenerate frames (start, stop) of codes [1, K, T].

    Args:
        sampler: made by `region_sampler` for these frames.
        seeds: of the candidates.
    """
    start, stop = frames
    candidates = []
    for seed in seeds:
        fork = sampler.clone([seed])
        made = []
        while (chunk := fork.next_frames(stop - start)) is not None:
            made.append(chunk)
        whole = torch.cat(made, -1)  # [1, K, all frames of the sampler]
        candidates.append(torch.cat([codes[..., :start], whole[..., start:stop], codes[..., stop:]], -1))
    if stop == codes.shape[-1]:
        return Repainted(candidates[0], 0, [None] * len(seeds))
    first = max(0, start - round(CONTEXT_SECONDS * frame_rate))
    last = min(codes.shape[-1], stop + round(SCORED_SECONDS * frame_rate))
    scored = torch.cat(candidates)[..., first:last]  # [n, K, t]
    controls = sampler.frame_controls(first, last)
    scores = score_following(sampler.model, sampler.pattern, scored, stop - first, sampler.conditions, controls)
    best = int(scores.argmax())
    return Repainted(candidates[best], best, scores.tolist())


def known_around(codes: Tensor, frames: tuple[int, int], pattern: Pattern) -> Tensor:
    """The prompt codes of a region's sampler: codes [B, K, T] with -1 in the region, up to the last frame that is in
    the sequence before the region's last code."""
    start, stop = frames
    reach = max(pattern.offsets) - min(pattern.offsets)
    n_frames = min(codes.shape[-1], stop + 1 + reach // pattern.stride)
    known = codes[..., : codes.shape[-1] if any(pattern.passes) else n_frames].clone()
    known[..., start:stop] = -1
    return known


@torch.inference_mode()
def score_following(
    model: TokenLM, pattern: Pattern, codes: Tensor, first: int, conditions: TextConditions, controls: Controls
) -> Tensor:
    """Mean log-likelihood in nats of the codes [n, K, T] from frame `first` on, given those before: [n]."""
    n = len(codes)
    sequence = pattern.build(codes, model.special_token_id)  # [n, K, S]
    inputs = torch.cat([torch.full_like(sequence[..., :1], model.special_token_id), sequence[..., :-1]], -1)
    by_position = controls.gather_frames(pattern.frames(codes.shape[-1]).to(codes.device)).repeat(n)
    text = conditions.heaviest_text().to(codes.device)
    text = text._replace(embeddings=text.embeddings.expand(n, -1, -1), mask=text.mask.expand(n, -1))
    logits = model(inputs, text, controls=by_position)
    assert isinstance(logits, Tensor)
    log_p = logits[..., : model.config.codebook_size].float().log_softmax(-1)  # [n, K, S, V]
    frame_of = pattern.code_frames(torch.arange(sequence.shape[-1]), codes.shape[-1]).T.to(codes.device)  # [K, S]
    scored = (frame_of >= first).expand(n, -1, -1)
    targets = sequence.clamp(max=model.config.codebook_size - 1).unsqueeze(-1)
    return log_p.gather(-1, targets).squeeze(-1).where(scored, 0.0).sum((1, 2)) / scored.sum((1, 2))


def mix_region(original: Tensor, decoded: Tensor, start: int, stop: int, fade: int) -> Tensor:
    """The clip [C, S] with decoded audio in samples start..stop, and a linear mix of the two in `fade` samples on
    either side; the rest is the clip's own samples."""
    out = original.clone()
    first, last = max(0, start - fade), min(original.shape[-1], stop + fade)
    weight = torch.ones(last - first)
    if n := start - first:
        weight[:n] = torch.arange(1, n + 1) / (n + 1)
    if n := last - stop:
        weight[-n:] = torch.arange(n, 0, -1) / (n + 1)
    out[:, first:last] = torch.lerp(original[:, first:last], decoded[:, first:last], weight)
    return out


def fade_samples(context: tuple[int, int] | None, hop: int) -> int:
    """Samples of the mix, within what a changed code can change in the decoder's output."""
    return hop * (_FADE_FRAMES if context is None else min(_FADE_FRAMES, *context))
