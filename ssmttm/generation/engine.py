"""The sampling loop: one prefill, then one cached step per position, conditional and null rows in one batch.

Shapes: B items, R prompts of an item, K codebooks, T frames, S positions of the pattern's sequence, V codes per
codebook. The model runs on R B rows, and B more with guidance: row r B + i is item i with its prompt r, row R B + i the
same item with the null condition and no controls. So guidance is towards text and controls together.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.generation.engines import Engine, Steps
from ssmttm.generation.engines.reference import TorchEngine
from ssmttm.generation.request import Sampling
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState, TokenLM
from ssmttm.patterns import Pattern
from ssmttm.text.condition import TextCondition

_TO_SAMPLE = -1  # in a template: a position that is not known yet
_BLOCK = 256  # positions whose templates, uniforms and controls are made and copied to the device together


@dataclass(frozen=True)
class TextConditions:
    """What B items are conditioned on.

    Attributes:
        texts: R >= 1 prompts of every item, B captions each.
        null_text: the null condition or a negative prompt, one row (shared) or B rows.
        weights: [R, B], the weight of each prompt in the blend of their logits, with a sum of 1; None with one prompt.
    """

    texts: Sequence[TextCondition]
    null_text: TextCondition
    weights: Tensor | None = None

    def heaviest_text(self) -> TextCondition:
        """The prompt of the greatest weight of every item, B captions."""
        if self.weights is None:
            return self.texts[0]
        chosen = [self.texts[prompt] for prompt in self.weights.argmax(0).tolist()]
        return TextCondition.stack([text.embeddings[i, text.mask[i]] for i, text in enumerate(chosen)])


@dataclass
class ConditionedRows:
    """The model's rows under one set of conditions.

    Attributes:
        n_prompts, weights: of a blend, see `TextConditions`.
        guided: whether there are null rows.
        logits: [rows, K, V'] of the next position.
        steps: the engine's, on their state.
    """

    n_prompts: int
    weights: Tensor | None
    guided: bool
    logits: Tensor
    steps: Steps

    def clone(self) -> "ConditionedRows":
        return replace(self, steps=self.steps.on(self.state.clone()), logits=self.logits.clone())

    @property
    def state(self) -> LMState:
        return self.steps.state

    def blended_logits(self, batch: int) -> Tensor:
        """One row per item, and its null row if guided: [B or 2 B (at least), K, V']."""
        weights, n = self.weights, self.n_prompts
        if weights is None:
            return self.logits
        parts = self.logits[: n * batch].unflatten(0, (n, batch))  # [R, B, K, V']
        blend = (weights.to(parts)[..., None, None] * parts).sum(0)
        return torch.cat([blend, self.logits[n * batch : (n + 1) * batch]]) if self.guided else blend


@dataclass(frozen=True)
class PositionBlock:
    """What is known in advance of the positions from `start` on; see `CodeSampler`.

    template: [n, B, K], special tokens, given codes and _TO_SAMPLE. uniforms: [n, B, K].
    """

    start: int
    template: Tensor
    to_sample: Tensor
    all_sampled: list[bool]
    uniforms: Tensor
    controls: Controls

    @property
    def stop(self) -> int:
        return self.start + len(self.all_sampled)


class CodeSampler:
    """Samples the codes of B items, as many frames as requested. It holds all that the next frame depends on, in memory
    that does not grow: a clone goes on exactly as the original does.

    Attributes:
        position: the next position to sample.
        n_yielded: frames returned so far, with those of the prompt.
    """

    @torch.inference_mode()
    def __init__(
        self, model: TokenLM, conditions: TextConditions, pattern: Pattern, n_frames: int | None, sampling: Sampling,
        seeds: Sequence[int], prompt_codes: Tensor | None = None, controls: Controls | None = None,
        context_frames: int = 0, engine: Engine | None = None,
    ) -> None:  # fmt: skip
        """Process the text and the prompt.

        Args:
            model: in eval mode.
            n_frames: T >= 1, including the prompt; None: without an end, with a pattern in one pass.
            seeds: B seeds of 32 bits. An item's tokens depend on its own inputs and seed only: on a CPU its logits are
                the same in any batch, bit for bit.
            prompt_codes: [B, K, P] with P <= T, frames to continue; they are returned first. Frames of -1 are sampled:
                what follows them is then known, and the model's input, where it comes before their last codebooks.
            controls: of B items, by frame; a melody may be shorter than T. Null rows have none.
            context_frames: frames that are kept for a later `change` of the conditions.
            engine: of the model's steps; None: torch.

        Raises:
            UserError: the model was not built for a control, or the pattern needs T.
        """
        batch, n_codebooks = len(seeds), model.config.n_codebooks
        if model.training:
            raise ValueError("put the model in eval mode before sampling (dropout is active)")
        n_texts, n_null = {len(text.mask) for text in conditions.texts}, len(conditions.null_text.mask)
        if n_texts != {batch} or n_null not in (1, batch):
            raise ValueError(f"got {n_texts} captions and {n_null} null conditions for {batch} seeds")
        self.model, self.pattern, self.n_frames, self.sampling = model, pattern, n_frames, sampling
        self.engine = engine or TorchEngine(model)
        self.conditions, self.context_frames = conditions, context_frames
        self.device = next(model.parameters()).device
        self.n_yielded = 0
        self._batch, self._n_codebooks = batch, n_codebooks
        self._prompt = torch.zeros(batch, n_codebooks, 0, dtype=torch.long) if prompt_codes is None else prompt_codes
        self._block: PositionBlock | None = None
        self.set_controls(controls or Controls())
        self.position = first = self._first_position()
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        _draw(self._generators, first, n_codebooks)  # a position's numbers do not depend on the prompt
        self._sequence = list(self._template(torch.arange(first)).to(self.device).unbind(0))  # of [B, K]
        self._sequence_start = 0
        self._last_codes: Tensor | None = None  # of the last position, if the model has not processed them yet
        self._rows = [self._prefill(conditions, sampling.guidance_scale != 1.0)]  # two while one fades into the other
        self._fade = (0, 0)  # its first position and its length

    @torch.inference_mode()
    def next_frames(self, chunk_frames: int = 1) -> Tensor | None:
        """The next frames, int64 [B, K, t], t >= `chunk_frames` but at the end; None after the end. Raises UserError if
        the model's logits are not finite."""
        if self.n_yielded == self.n_frames:
            return None
        while True:
            n_ready = self.pattern.n_complete(self.position, self.n_frames)
            if n_ready - self.n_yielded >= chunk_frames or (n_ready == self.n_frames and n_ready > self.n_yielded):
                break
            self._sample_positions(self._positions_until(self.n_yielded + chunk_frames))
        _check_finite(self._rows[-1].logits)
        frames = self._gather(self.n_yielded, n_ready)
        self.n_yielded = n_ready
        self._drop_old_positions()
        return frames

    def skip(self, n_frames: int) -> None:
        """Do not return that many frames of the prompt."""
        self.n_yielded += n_frames
        self._drop_old_positions()

    @torch.inference_mode()
    def change(
        self, conditions: TextConditions | None = None, sampling: Sampling | None = None,
        controls: Controls | None = None, fade_frames: int = 0,
    ) -> None:  # fmt: skip
        """Change what the next positions depend on. With new conditions or controls the last `context_frames` frames
        are processed again; during the next `fade_frames` frames the logits move from the old ones' to theirs.

        Raises:
            UserError: the pattern goes over the frames more than once, or the model was not built for a control.
        """
        sampling = sampling or self.sampling
        rows = self._rows[-1]
        guided = rows.guided or sampling.guidance_scale != 1.0
        if conditions is not None or controls is not None or guided != rows.guided:
            self.pattern.check_one_pass("a change of the prompt while sampling")
            self._process_last_codes()
            if controls is not None:
                self.set_controls(controls)
            self.conditions = conditions or self.conditions
            new = self._prefill(self.conditions, guided)
            fade = fade_frames * self.pattern.stride if guided == rows.guided and self.n_yielded else 0
            self._rows, self._fade = [rows, new] if fade else [new], (self.position, fade)
        self.sampling = sampling

    def set_controls(self, controls: Controls) -> None:
        """Controls of the positions to come, by frame. Raises UserError if the model was not built for one of them."""
        self._controls = controls.to(self.device)
        self._controls_at(torch.arange(1)).check(self.model.config, "language model", self._batch, 1)
        if self._block is not None:
            block = self._block
            self._block = replace(block, controls=self._controls_at(torch.arange(block.start, block.stop)))

    @torch.inference_mode()
    def clone(self, seeds: Sequence[int] | None = None) -> "CodeSampler":
        """A copy that goes on independently: exactly as this one, or with other seeds."""
        new = copy.copy(self)
        new._rows = [rows.clone() for rows in self._rows]
        new._sequence = list(self._sequence)
        if seeds is None:
            new._generators = [generator.clone_state() for generator in self._generators]
            return new
        if len(seeds) != self._batch:
            raise ValueError(f"got {len(seeds)} seeds for {self._batch} items")
        new._generators, new._block = [torch.Generator().manual_seed(seed) for seed in seeds], None
        return new

    def state(self) -> dict[str, Any]:
        """All that the next frame depends on besides the model, the conditions and the settings, as plain values and
        tensors."""
        block = self._block
        return {
            "n_frames": self.n_frames, "position": self.position, "n_yielded": self.n_yielded,
            "fade": list(self._fade),
            "sequence": torch.stack(self._sequence) if self._sequence else None,
            "sequence_start": self._sequence_start, "last_codes": self._last_codes, "prompt": self._prompt,
            "uniforms": None if block is None else block.uniforms[self.position - block.start :],
            "generators": [generator.get_state() for generator in self._generators],
            "rows": [vars(rows) | {"steps": rows.state} for rows in self._rows],
        }  # fmt: skip

    @torch.inference_mode()
    def restore(self, state: dict[str, Any], fill: Callable[[LMState, Any], LMState]) -> None:
        """Take the `state` of a sampler of the same model, conditions and settings. `fill` puts the values of a model's
        state into a new one."""
        self.n_frames, self.position, self.n_yielded = state["n_frames"], state["position"], state["n_yielded"]
        self._fade = (state["fade"][0], state["fade"][1])
        self._prompt, self._sequence_start = state["prompt"], state["sequence_start"]
        to = self.device
        self._sequence = [] if state["sequence"] is None else list(state["sequence"].to(to).unbind(0))
        self._last_codes = None if state["last_codes"] is None else state["last_codes"].to(to)
        for generator, values in zip(self._generators, state["generators"], strict=True):
            generator.set_state(values)
        self._block = None if state["uniforms"] is None else self._new_block(self.position, state["uniforms"])
        self._rows = []
        for rows in state["rows"]:
            new = fill(self.model.init_state(rows["steps"]["batch_size"], device=to), rows["steps"])
            own = {name: rows[name] for name in ("n_prompts", "weights", "guided")}
            steps = self._bind(new, own["n_prompts"], own["guided"])
            self._rows.append(ConditionedRows(**own, logits=rows["logits"].to(to), steps=steps))

    def _positions_until(self, n_frames: int) -> int:
        """How many positions complete that many frames, or all."""
        wanted = n_frames if self.n_frames is None else min(n_frames, self.n_frames)
        count = 1
        while self.pattern.n_complete(self.position + count, self.n_frames) < wanted:
            count += 1
        return count

    def _sample_positions(self, count: int) -> None:
        """Sample the codes of the next positions: `count`, or fewer at the end of a block."""
        rows = self._rows[-1]
        if len(self._rows) > 1 or rows.weights is not None:
            self._sample_position()
            return
        block = self._block_at(self.position)
        index = self.position - block.start
        n = slice(index, min(index + count, len(block.all_sampled)))
        codes, rows.logits = rows.steps.run(
            self._last_codes, rows.logits, block.template[n], block.uniforms[n], block.controls, index, self.sampling,
            self.guided,
        )  # fmt: skip
        self._sequence += codes.unbind(0)  # of [B, K]
        self._last_codes = codes[-1]
        self.position += len(codes)

    def _sample_position(self) -> None:
        """Sample the codes of the next position from logits that several sets of rows give together."""
        position = self.position
        self._process_last_codes()
        block = self._block_at(position)
        index = position - block.start
        logits = self._logits()
        codes = self.engine.draw(logits, block.uniforms[index], self.sampling, self.guided)
        if not block.all_sampled[index]:
            codes = torch.where(block.to_sample[index], codes, block.template[index])
        self._sequence.append(codes)  # [B, K]
        self._last_codes = codes
        self.position += 1

    @property
    def guided(self) -> bool:
        """Whether there are null rows."""
        return self._rows[-1].guided

    def _process_last_codes(self) -> None:
        """One step of the model, unless its logits are those of the next position already."""
        codes = self._last_codes
        if codes is None:
            return
        block = self._block_at(self.position)
        index = self.position - block.start
        for rows in self._rows:
            rows.logits = rows.steps.step(codes, block.controls, index)
        self._last_codes = None

    def _logits(self) -> Tensor:
        """Logits of the next position, one row per item and its null row if guided."""
        new = self._rows[-1].blended_logits(self._batch)
        if len(self._rows) == 1:
            return new
        start, length = self._fade
        n_done = self.position - start + 1
        if n_done >= length:
            self._rows = self._rows[1:]
            return new
        n = (1 + self.guided) * self._batch
        return self._rows[0].blended_logits(self._batch)[:n].lerp(new[:n], n_done / length)

    def _prefill(self, conditions: TextConditions, guided: bool) -> ConditionedRows:
        """Rows that have processed the text, then the start column and the sequence (its context, once older frames are
        forgotten), on a CPU item by item, each with its own padding only: no bits depend on the other items."""
        model, batch, device = self.model, self._batch, self.device
        codes = self._context_codes()  # [B, K, n]
        length = codes.shape[-1]
        controls = self._controls_at(torch.arange(self.position + 1 - length, self.position + 1))
        n_conditions = len(conditions.texts) + guided
        n_rows = batch * n_conditions
        state = model.init_state(self.engine.n_rows(n_rows), device=device)
        logits = []
        size = batch if self.engine.batched_prefill else 1
        for first in range(0, batch, size):
            items = range(first, first + size)
            condition = _condition(conditions, items, guided).to(device)
            part = model.init_state(n_conditions * size, device=device)
            of_items = slice(first, first + size)
            part_codes = codes[of_items].repeat(n_conditions, 1, 1)  # condition by condition
            part_controls = controls.select_rows(of_items).repeat(n_conditions)
            if guided:
                is_null = torch.arange(n_conditions * size, device=device) >= len(conditions.texts) * size
                part_controls = part_controls.drop(is_null)
            with self.engine.prefill_context():
                last = model.prefill(part_codes, condition, part, part_controls)
            logits.append(last.unflatten(0, (n_conditions, size)))
            state.write_rows(slice(first, n_rows, batch) if size == 1 else slice(0, n_rows), part)
        rows_of_items = torch.cat(logits, dim=1).flatten(0, 1)
        steps = self._bind(state, len(conditions.texts), guided)
        return ConditionedRows(len(conditions.texts), conditions.weights, guided, rows_of_items, steps)

    def _bind(self, state: LMState, n_prompts: int, guided: bool) -> Steps:
        return self.engine.bind(state, self._batch, n_prompts * self._batch if guided else None)

    def _context_codes(self) -> Tensor:
        """The start column, then the positions of the kept frames as the first positions of a clip: [B, K, n]."""
        special = self.model.special_token_id
        first_frame = 0
        if self._sequence_start:
            n_ready = self.pattern.n_complete(self.position, self.n_frames)
            first_frame = max(0, n_ready - self.context_frames)
        positions = torch.arange(first_frame * self.pattern.stride, self.position)
        start = torch.full((1, self._batch, self._n_codebooks), special, dtype=torch.long, device=self.device)
        if not len(positions):
            return start.permute(1, 2, 0)
        codes = torch.stack(self._sequence[int(positions[0]) - self._sequence_start :])  # [n, B, K]
        if first_frame:
            forgotten = self.pattern.code_frames(positions, self.n_frames) < first_frame  # [n, K]
            codes = codes.masked_fill(forgotten[:, None].to(self.device), special)
        return torch.cat([start, codes]).permute(1, 2, 0)

    def _block_at(self, position: int) -> PositionBlock:
        """The block with this position, made when it is reached."""
        if self._block is not None and position < self._block.stop:
            return self._block
        stop = position + _BLOCK
        if self.n_frames is not None:
            stop = min(stop, self.pattern.sequence_length(self.n_frames))
        self._block = self._new_block(position, _draw(self._generators, stop - position, self._n_codebooks))
        return self._block

    def _new_block(self, start: int, uniforms: Tensor) -> PositionBlock:
        """The block of the positions from `start` on with these uniforms, [n, B, K]."""
        positions = torch.arange(start, start + len(uniforms))
        template = self._template(positions)
        to_sample = template == _TO_SAMPLE
        return PositionBlock(
            start, template.to(self.device), to_sample.to(self.device), to_sample.flatten(1).all(1).tolist(),
            uniforms.to(self.device), self._controls_at(positions),
        )  # fmt: skip

    def _template(self, positions: Tensor) -> Tensor:
        """What the sequence is known to hold, [n, B, K]: pattern padding, prompt codes, and positions to sample."""
        frames = self.pattern.code_frames(positions, self.n_frames)[:, None]  # [n, 1, K]
        n_given = self._prompt.shape[-1]
        known = torch.full((len(positions), self._batch, self._n_codebooks), _TO_SAMPLE, dtype=torch.long)
        if n_given:
            index = frames.clamp(0, n_given - 1).expand_as(known).permute(1, 2, 0)
            known = known.where(frames >= n_given, self._prompt.cpu().gather(2, index).permute(2, 0, 1))
        return known.masked_fill(frames < 0, self.model.special_token_id)

    def _first_position(self) -> int:
        """The first position to sample, or the last one if all are known."""
        to_sample = (self._prompt == _TO_SAMPLE).flatten(0, 1).any(0)  # [P]
        n_given = int(to_sample.int().argmax()) if bool(to_sample.any()) else len(to_sample)
        if self.n_frames is not None and n_given >= self.n_frames:
            return self.pattern.sequence_length(self.n_frames) - 1
        return min(self.pattern.starts(self.n_frames)) + self.pattern.stride * n_given

    def frame_controls(self, start: int, stop: int) -> Controls:
        """Controls of the frames start..stop of all items."""
        return self._controls.gather_frames(torch.arange(start, stop, device=self.device))

    def _controls_at(self, positions: Tensor) -> Controls:
        """Controls by position of all items."""
        frames = self.pattern.newest_frames(positions, self.n_frames)
        return self._controls.gather_frames(frames.to(self.device))

    def _gather(self, start: int, stop: int) -> Tensor:
        """Frames start..stop of the sequence, [B, K, stop - start]."""
        first = torch.tensor(self.pattern.starts(self.n_frames)) - self._sequence_start  # [K]
        positions = first + self.pattern.stride * torch.arange(start, stop)[:, None]  # [t, K]
        lowest, highest = int(positions.min()), int(positions.max())
        sequence = torch.stack(self._sequence[lowest : highest + 1])  # [n, B, K]
        index = (positions - lowest).to(self.device).unsqueeze(1).expand(-1, self._batch, -1)  # [t, B, K]
        return sequence.gather(0, index).permute(1, 2, 0)

    def _drop_old_positions(self) -> None:
        """Drop positions that neither frames to come nor a change of the conditions need."""
        if any(self.pattern.passes):
            return
        first = self.pattern.stride * max(0, self.n_yielded - self.context_frames)
        del self._sequence[: first - self._sequence_start]
        self._sequence_start = max(first, self._sequence_start)


def draw_uniforms(seeds: Sequence[int], n_positions: int, n_codebooks: int) -> Tensor:
    """One uniform per position and codebook from each item's own generator: [S, B, K] float64 on the CPU.

    Item i's numbers depend on `seeds[i]` only, and those of a shorter sequence are a prefix of a longer one's.
    """
    return _draw([torch.Generator().manual_seed(seed) for seed in seeds], n_positions, n_codebooks)


def generate(
    model: TokenLM, text: TextCondition, null_text: TextCondition, pattern: Pattern, n_frames: int,
    sampling: Sampling, seeds: Sequence[int], prompt_codes: Tensor | None = None, controls: Controls | None = None,
    engine: Engine | None = None,
) -> Tensor:  # fmt: skip
    """Sample codes [B, K, T]; arguments as in `generate_frames`."""
    inputs = (text, null_text, pattern, n_frames, sampling, seeds, prompt_codes, n_frames, controls, engine)
    return torch.cat(list(generate_frames(model, *inputs)), dim=-1)


def generate_frames(
    model: TokenLM, text: TextCondition, null_text: TextCondition, pattern: Pattern, n_frames: int,
    sampling: Sampling, seeds: Sequence[int], prompt_codes: Tensor | None = None, chunk_frames: int = 1,
    controls: Controls | None = None, engine: Engine | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample codes [B, K, T] of B captions and yield frames [B, K, t] as soon as their last codebook is sampled; see
    `CodeSampler`."""
    conditions = TextConditions([text], null_text)
    sampler = CodeSampler(model, conditions, pattern, n_frames, sampling, seeds, prompt_codes, controls, 0, engine)
    while (frames := sampler.next_frames(chunk_frames)) is not None:
        yield frames


def _draw(generators: Sequence[torch.Generator], n_positions: int, n_codebooks: int) -> Tensor:
    """The next uniforms of each item's generator, [n, B, K] float64."""
    shape = n_positions, n_codebooks
    return torch.stack([torch.rand(shape, generator=own, dtype=torch.float64) for own in generators], dim=1)


def _condition(conditions: TextConditions, items: Sequence[int], guided: bool) -> TextCondition:
    """The captions of some items, prompt by prompt, and with guidance their null conditions, padded to the longest."""
    rows = [text.embeddings[item, text.mask[item]] for text in conditions.texts for item in items]
    if guided:
        null_text = conditions.null_text
        indices = [item if len(null_text.mask) > 1 else 0 for item in items]
        rows += [null_text.embeddings[index, null_text.mask[index]] for index in indices]
    return TextCondition.stack(rows)


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite (damaged or diverged): try an earlier checkpoint")
