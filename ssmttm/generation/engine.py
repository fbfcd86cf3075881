"""The sampling loop: one prefill, then one cached step per position, conditional and null rows in one batch.

Shapes: B items, K codebooks, T frames, S positions of the pattern's sequence, V codes per codebook. With guidance the
model runs on 2 B rows: row i is item i with its caption, row B + i the same item with the null condition.
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

_TO_SAMPLE = -1  # in a template: a position that is not known yet
# MKL sums the products of 1, of 2 or 3, and of 4 rows or more in different orders, and splits the rows over threads. In
# multiples of 4 a row's result does not depend on the other rows, bit for bit; 4 rows cost about as much as 2.
_CPU_ROWS = 4


def draw_uniforms(seeds: Sequence[int], n_positions: int, n_codebooks: int) -> Tensor:
    """One uniform per position and codebook from each item's own generator: [S, B, K] float64 on the CPU.

    Item i's numbers depend on `seeds[i]` only, and those of a shorter sequence are a prefix of a longer one's.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(n_positions, n_codebooks, generator=generator, dtype=torch.float64))
    return torch.stack(rows, dim=1)


def generate(
    model: TokenLM, text: TextCondition, null_text: TextCondition, pattern: Pattern, n_frames: int,
    sampling: Sampling, seeds: Sequence[int], prompt_codes: Tensor | None = None, controls: Controls | None = None,
) -> Tensor:  # fmt: skip
    """Sample codes [B, K, T]; arguments as in `generate_frames`."""
    inputs = (text, null_text, pattern, n_frames, sampling, seeds, prompt_codes, n_frames, controls)
    return torch.cat(list(generate_frames(model, *inputs)), dim=-1)


@torch.inference_mode()
def generate_frames(
    model: TokenLM, text: TextCondition, null_text: TextCondition, pattern: Pattern, n_frames: int,
    sampling: Sampling, seeds: Sequence[int], prompt_codes: Tensor | None = None, chunk_frames: int = 1,
    controls: Controls | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample codes and yield frames as soon as their last codebook is sampled; memory does not grow with the length but
    for the codes. Raises UserError if the model's logits are not finite, or it was not built for a control.

    Args:
        model: in eval mode.
        text: B captions. null_text: the null condition, one row (shared) or B rows.
        n_frames: T >= 1, including the prompt.
        seeds: B seeds of 32 bits. An item's tokens depend on its own inputs and seed only: on a CPU its logits are the
            same in any batch, bit for bit.
        prompt_codes: [B, K, P] with P <= T, frames to continue; they are yielded first.
        chunk_frames: smallest number of frames in a chunk, but for the last.
        controls: of B items, by frame; a melody may be shorter than T. They condition the null rows too: guidance is
            towards the text.

    Yields:
        [B, K, t] int64 codes; t sums to T.
    """
    batch, n_codebooks, special = len(seeds), model.config.n_codebooks, model.special_token_id
    if model.training:
        raise ValueError("put the model in eval mode before sampling (dropout is active)")
    if len(text.mask) != batch or len(null_text.mask) not in (1, batch):
        raise ValueError(f"got {len(text.mask)} captions and {len(null_text.mask)} null conditions for {batch} seeds")
    device = next(model.parameters()).device
    guided = sampling.guidance_scale != 1.0
    template = _template(pattern, batch, n_codebooks, n_frames, special, prompt_codes).to(device)  # [S, B, K]
    n_positions, to_sample = len(template), template == _TO_SAMPLE
    sequence = template.clone()
    frame_positions, n_complete = _layout(pattern, n_codebooks, n_frames)
    uniforms = draw_uniforms(seeds, n_positions, n_codebooks).to(device)  # [S, B, K]
    controls = (controls or Controls()).gather_frames(pattern.frames(n_frames)).to(device)  # by position
    controls.check(model.config, "language model", batch, n_positions)

    all_sampled = to_sample.flatten(1).all(1).tolist()
    n_known = int(to_sample.flatten(1).any(1).int().cumsum(0).eq(0).sum())  # leading positions
    first = min(n_known, n_positions - 1)
    start = torch.full((1, batch, n_codebooks), special, dtype=torch.long, device=device)
    prefix_codes = torch.cat([start, sequence[:first]]).permute(1, 2, 0)  # [B, K, first + 1]
    conditions = [_condition(text, null_text if guided else None, item).to(device) for item in range(batch)]
    logits, state, item_of_row = _prefill(model, prefix_codes, conditions, controls.select_frames(slice(first + 1)))
    controls = controls.select_rows(item_of_row)

    n_yielded = 0
    for position in range(first, n_positions):
        codes = _sample(logits, uniforms[position], model.config.codebook_size, sampling, guided)  # [B, K]
        if not all_sampled[position]:
            codes = torch.where(to_sample[position], codes, template[position])
        sequence[position] = codes
        n_ready = n_complete[position]
        if n_ready - n_yielded >= chunk_frames or (n_ready == n_frames and n_ready > n_yielded):
            _check_finite(logits)
            yield _gather_frames(sequence, frame_positions, n_yielded, n_ready)
            n_yielded = n_ready
        if position + 1 < n_positions:
            logits = model.step(codes[item_of_row], state, controls.select_frames(slice(position + 1, position + 2)))


def _prefill(
    model: TokenLM, codes: Tensor, conditions: list[TextCondition], controls: Controls
) -> tuple[Tensor, LMState, Tensor]:
    """Prefill codes [B, K, n] item by item, each with its own padding only, into one state for all rows.

    Returns:
        logits [rows, K, V'], the state, and the item of each row of the state.
    """
    batch, n_conditions, device = len(codes), len(conditions[0].mask), codes.device
    rows = batch * n_conditions
    padded = rows if device.type != "cpu" else math.ceil(rows / _CPU_ROWS) * _CPU_ROWS
    state = model.init_state(padded, device=device)
    logits = []
    for item, condition in enumerate(conditions):
        item_state = model.init_state(n_conditions, device=device)
        item_controls = controls.select_rows(slice(item, item + 1)).repeat(n_conditions)
        item_codes = codes[item].expand(n_conditions, -1, -1)
        logits.append(model.prefill(item_codes, condition, item_state, item_controls))
        state.write_rows(slice(item, rows, batch), item_state)
    return torch.stack(logits, dim=1).flatten(0, 1), state, torch.arange(padded, device=device) % batch


def _sample(logits: Tensor, uniforms: Tensor, codebook_size: int, sampling: Sampling, guided: bool) -> Tensor:
    """Logits of all rows, [.., K, V'], and [B, K] uniforms -> [B, K] tokens."""
    batch = len(uniforms)
    logits = filters.without_special(logits, codebook_size).float()
    conditional = logits[:batch]
    if guided:
        null = logits[batch : 2 * batch]
        conditional = null.lerp(conditional, sampling.guidance_scale)  # null + scale * (conditional - null)
    logits = filters.top_k(filters.temperature(conditional, sampling.temperature), sampling.top_k)
    return filters.draw(filters.top_p(logits, sampling.top_p), uniforms)


def _condition(text: TextCondition, null_text: TextCondition | None, item: int) -> TextCondition:
    """The caption of one item and, with guidance, its null condition, padded to the longer of the two."""
    rows = [text.embeddings[item, text.mask[item]]]
    if null_text is not None:
        index = item if len(null_text.mask) > 1 else 0
        rows.append(null_text.embeddings[index, null_text.mask[index]])
    return TextCondition.stack(rows)


def _template(
    pattern: Pattern, batch: int, n_codebooks: int, n_frames: int, special: int, prompt_codes: Tensor | None
) -> Tensor:
    """The sequence before sampling, [S, B, K]: pattern padding, prompt codes, and positions to sample."""
    codes = torch.full((batch, n_codebooks, n_frames), _TO_SAMPLE, dtype=torch.long)
    if prompt_codes is not None:
        codes[..., : prompt_codes.shape[-1]] = prompt_codes
    return pattern.build(codes, special).permute(2, 0, 1).contiguous()


def _layout(pattern: Pattern, n_codebooks: int, n_frames: int) -> tuple[Tensor, list[int]]:
    """The position of each code, [K, T], and the number of complete leading frames after each position."""
    frames = torch.arange(n_frames).expand(1, n_codebooks, n_frames)
    frame_at = pattern.build(frames, -1)[0]  # [K, S] frame numbers, -1 at padding
    rows = []
    for row in frame_at:
        positions = (row >= 0).nonzero().squeeze(-1)
        rows.append(positions[row[positions].argsort()])
    frame_positions = torch.stack(rows)  # [K, T]
    last = frame_positions.amax(0).cummax(0).values  # [T]
    return frame_positions, torch.searchsorted(last, torch.arange(frame_at.shape[1]), right=True).tolist()


def _gather_frames(sequence: Tensor, frame_positions: Tensor, start: int, stop: int) -> Tensor:
    """Frames start..stop of the sequence [S, B, K] -> [B, K, stop - start]."""
    positions = frame_positions[:, start:stop].T.to(sequence.device)  # [t, K]
    index = positions.unsqueeze(1).expand(-1, sequence.shape[1], -1)  # [t, B, K]
    return sequence.gather(0, index).permute(1, 2, 0)


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite (damaged or diverged): try an earlier checkpoint")
