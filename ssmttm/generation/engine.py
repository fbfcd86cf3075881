"""The sampling loop: one prefill, then one cached step a position, conditional and null rows in one batch.

Shapes: B items, K codebooks, T frames, S positions of the pattern's sequence, V codes a codebook. With guidance the
model runs on 2 B rows: row i is item i under its caption, row B + i the same item under the null condition.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.generation import filters
from ssmttm.generation.request import Sampling
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState, TokenLM
from ssmttm.patterns import Pattern
from ssmttm.text.condition import TextCondition

_OPEN = -1  # a position of the sequence that is still to be sampled
# MKL adds up the products of 1, of 2 or 3, and of 4 rows or more in different orders, and splits the rows over threads.
# In multiples of 4 a row's result is the same bits whatever its companions; 4 rows cost about as much as 2.
_CPU_ROWS = 4


def draw_uniforms(seeds: Sequence[int], n_positions: int, n_codebooks: int) -> Tensor:
    """One uniform a position and codebook from each item's own generator: [S, B, K] float64 on the CPU.

    Item i's numbers depend on `seeds[i]` alone, and a longer sequence begins with those of a shorter one.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(n_positions, n_codebooks, generator=generator, dtype=torch.float64))
    return torch.stack(rows, dim=1)


def generate(
    model: TokenLM,
    text: TextCondition,
    null_text: TextCondition,
    pattern: Pattern,
    n_frames: int,
    sampling: Sampling,
    seeds: Sequence[int],
    prompt_codes: Tensor | None = None,
    controls: Controls | None = None,
) -> Tensor:
    """Sample codes [B, K, T]: all frames of `generate_frames` together."""
    chunks = generate_frames(model, text, null_text, pattern, n_frames, sampling, seeds, prompt_codes, n_frames, controls)
    return torch.cat(list(chunks), dim=-1)


@torch.inference_mode()
def generate_frames(
    model: TokenLM,
    text: TextCondition,
    null_text: TextCondition,
    pattern: Pattern,
    n_frames: int,
    sampling: Sampling,
    seeds: Sequence[int],
    prompt_codes: Tensor | None = None,
    chunk_frames: int = 1,
    controls: Controls | None = None,
) -> Iterator[Tensor]:
    """Sample codes and hand over whole frames as soon as their last codebook is drawn. Memory does not grow with length
    but for the codes themselves.

    Args:
        model: in eval mode.
        text: B captions' condition; null_text: the null condition, one row (shared) or B rows.
        pattern: the interleaving that the model was trained with.
        n_frames: T >= 1, prompt included.
        seeds: B seeds, each of 32 bits; an item's tokens depend on its own caption, wishes and seed alone: on a CPU
            its logits are the same bits whatever its companions.
        prompt_codes: [B, K, P] with P <= T, frames to go on from; they come first in what is yielded.
        chunk_frames: least number of frames in a chunk but the last.
        wishes: of B items, by frame; a melody may be shorter than the piece. Both rows of an item are told them:
            guidance is towards the text.

    Yields:
        [B, K, t] int64 codes; t sums to T.

    Raises:
        UserError: the model's logits are not finite, or it was not built for a wish.
    """
    batch, n_codebooks, special = len(seeds), model.config.n_codebooks, model.special_token_id
    if model.training:
        raise ValueError("put the model in eval mode before sampling (dropout is active)")
    if len(text.mask) != batch or len(null_text.mask) not in (1, batch):
        raise ValueError(f"{len(text.mask)} captions and {len(null_text.mask)} null conditions for {batch} seeds")
    device = next(model.parameters()).device
    guided = sampling.guidance_scale != 1.0
    plan = _plan(pattern, batch, n_codebooks, n_frames, special, prompt_codes).to(device)  # [S, B, K]
    sequence, is_open = plan.clone(), plan == _OPEN
    frame_of, complete_at = _layout(pattern, n_codebooks, n_frames)
    uniforms = draw_uniforms(seeds, len(plan), n_codebooks).to(device)  # [S, B, K]
    told = (controls or Controls()).at(pattern.frames(n_frames)).to(device)  # by position
    told.check(model.config, "language model", batch, len(plan))

    all_open = is_open.flatten(1).all(1).tolist()
    known = int(is_open.flatten(1).any(1).int().cumsum(0).eq(0).sum())  # leading positions with nothing to draw
    start = torch.full((1, batch, n_codebooks), special, dtype=torch.long, device=device)
    first = min(known, len(plan) - 1)
    head = torch.cat([start, sequence[:first]]).permute(1, 2, 0)  # [B, K, first + 1]
    conditions = [_condition(text, null_text if guided else None, item).to(device) for item in range(batch)]
    logits, state, item_of_row = _prefill(model, head, conditions, told.columns(slice(first + 1)))
    told = told.rows(item_of_row)

    done = 0
    for position in range(first, len(plan)):
        column = _sample(logits, uniforms[position], model.config.codebook_size, sampling, guided)  # [B, K]
        if not all_open[position]:
            column = torch.where(is_open[position], column, plan[position])
        sequence[position] = column
        ready = complete_at[position]
        if ready - done >= chunk_frames or (ready == n_frames and ready > done):
            _check_finite(logits)
            yield _frames(sequence, frame_of, done, ready)
            done = ready
        if position + 1 < len(plan):
            logits = model.step(column[item_of_row], state, told.columns(slice(position + 1, position + 2)))


def _prefill(
    model: TokenLM, codes: Tensor, conditions: list[TextCondition], controls: Controls
) -> tuple[Tensor, LMState, Tensor]:
    """Take in each item's text, codes [B, K, n] and wishes by itself, with its own padding only, into one state for all
    rows.

    Returns:
        logits [rows, K, V'], the state, and the item that each row of the state belongs to.
    """
    batch, n_conditions, device = len(codes), len(conditions[0].mask), codes.device
    rows = batch * n_conditions
    padded = rows if device.type != "cpu" else math.ceil(rows / _CPU_ROWS) * _CPU_ROWS
    state = model.init_state(padded, device=device)
    logits = []
    for item, condition in enumerate(conditions):
        own = model.init_state(n_conditions, device=device)
        its_codes, its_wishes = codes[item].expand(n_conditions, -1, -1), controls.rows(slice(item, item + 1))
        logits.append(model.prefill(its_codes, condition, own, its_wishes.repeat(n_conditions)))
        state.put(slice(item, rows, batch), own)
    return torch.stack(logits, dim=1).flatten(0, 1), state, torch.arange(padded, device=device) % batch


def _sample(logits: Tensor, uniforms: Tensor, codebook_size: int, sampling: Sampling, guided: bool) -> Tensor:
    """Logits of all rows, [.., K, V'], and [B, K] uniforms -> [B, K] tokens."""
    batch = len(uniforms)
    logits = filters.without_special(logits, codebook_size).float()
    conditional = logits[:batch]
    if guided:
        null = logits[batch : 2 * batch]
        conditional = null.lerp(conditional, sampling.guidance_scale)  # null + scale * (conditional - null)
    kept = filters.top_k(filters.temperature(conditional, sampling.temperature), sampling.top_k)
    return filters.draw(filters.top_p(kept, sampling.top_p), uniforms)


def _condition(text: TextCondition, null_text: TextCondition | None, item: int) -> TextCondition:
    """The rows of one item: its caption and, with guidance, its null condition, padded to the longer of the two."""
    rows = [text.embeddings[item, text.mask[item]]]
    if null_text is not None:
        index = item if len(null_text.mask) > 1 else 0
        rows.append(null_text.embeddings[index, null_text.mask[index]])
    return TextCondition.stack(rows)


def _plan(
    pattern: Pattern, batch: int, n_codebooks: int, n_frames: int, special: int, prompt_codes: Tensor | None
) -> Tensor:
    """The sequence before sampling, [S, B, K]: fill is special, the prompt's codes are set, the rest is open."""
    codes = torch.full((batch, n_codebooks, n_frames), _OPEN, dtype=torch.long)
    if prompt_codes is not None:
        codes[..., : prompt_codes.shape[-1]] = prompt_codes
    return pattern.build(codes, special).permute(2, 0, 1).contiguous()


def _layout(pattern: Pattern, n_codebooks: int, n_frames: int) -> tuple[Tensor, list[int]]:
    """Where each code stands, [K, T] positions, and how many leading frames are whole once a position is filled."""
    frames = torch.arange(n_frames).expand(1, n_codebooks, n_frames)
    placed = pattern.build(frames, -1)[0]  # [K, S] frame numbers, -1 on fill
    where = torch.stack([(row >= 0).nonzero().squeeze(-1)[row[row >= 0].argsort()] for row in placed])  # [K, T]
    last = where.amax(0).cummax(0).values  # [T]
    return where, torch.searchsorted(last, torch.arange(placed.shape[1]), right=True).tolist()


def _frames(sequence: Tensor, where: Tensor, start: int, stop: int) -> Tensor:
    """Frames start..stop out of the sequence [S, B, K] -> [B, K, stop - start]."""
    positions = where[:, start:stop].T.to(sequence.device)  # [t, K]
    index = positions.unsqueeze(1).expand(-1, sequence.shape[1], -1)  # [t, B, K]
    return sequence.gather(0, index).permute(1, 2, 0)


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model gives numbers that are not finite (damaged or diverged): try an earlier checkpoint")
