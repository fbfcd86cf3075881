"""What every engine has: a decoding step on an LMState's memory, and the draw of tokens.

Shapes: B items, K codebooks, V' logits of a codebook, D model width. A state has as many rows as prompts and null
conditions together: row i belongs to item i % B. Null rows have no controls.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ssmttm.generation.engines import filters
from ssmttm.generation.engines.library import Unavailable
from ssmttm.generation.request import Sampling
from ssmttm.models.controls import FRAME_CHANNELS, Controls
from ssmttm.models.token_lm import LMState, TokenLM
from ssmttm.ops.int8 import Int8Linear
from ssmttm.ops.linear import Linear


class Steps(ABC):
    """Decoding steps of `engine` on one state, which they update in place."""

    def __init__(self, engine: "Engine", state: LMState, n_items: int, n_conditional: int | None = None) -> None:
        """The first `n_conditional` rows have the controls of their items, the others none; None: all have."""
        self.engine, self.state, self.n_items, self.n_conditional = engine, state, n_items, n_conditional
        rows = torch.arange(state.batch_size, device=engine.model.embedding.weight.device)
        self.item_of_row = rows % n_items
        self.is_null = None if n_conditional is None else rows >= n_conditional  # [rows]

    def on(self, state: LMState) -> "Steps":
        """Steps of the same engine on another state of as many rows."""
        return self.engine.bind(state, self.n_items, self.n_conditional)

    def controls_of_rows(self, controls: Controls, positions: slice) -> Controls:
        """Controls of B items and a block of positions -> those of all rows at some of the positions."""
        rows = controls.select_frames(positions).select_rows(self.item_of_row)
        return rows if self.is_null is None else rows.drop(self.is_null)

    @abstractmethod
    def step(self, codes: Tensor, controls: Controls, index: int) -> Tensor:
        """Process the next position.

        Args:
            codes: [B, K].
            controls: of B items and a block of positions.
            index: of the next position in this block.

        Returns:
            logits [rows, K, V'].
        """

    def run(
        self, codes: Tensor | None, logits: Tensor, template: Tensor, uniforms: Tensor, controls: Controls, index: int,
        sampling: Sampling, guided: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Sample the codes of n positions.

        Args:
            codes: [B, K] of the position before, if it has not been processed yet; else None.
            logits: [rows, K, V'] of the first position, if it has.
            template: [n, B, K], known codes, and -1 where they are sampled. uniforms: [n, B, K] float64.
            controls, index: of the first position, as of `step`.

        Returns:
            codes [n, B, K], and the logits that the last ones were sampled from.
        """
        found = []
        for offset in range(len(template)):
            if codes is not None:
                logits = self.step(codes, controls, index + offset)
            codes = self.engine.draw(logits, uniforms[offset], sampling, guided)
            codes = codes.where(template[offset] < 0, template[offset])
            found.append(codes)
        return torch.stack(found), logits


class Engine(ABC):
    """How the decoding steps of one model run. The model's weights must not change any more.

    Attributes:
        name: "torch", "fused" or "ort".
        weights: format of the weights that a step reads: "fp32", "bf16" or "int8".
        reason: why this engine runs and no faster one, in one line.
        batched_prefill: whether the text of all items is processed at once, which is faster and rounds differently.
    """

    name: str
    batched_prefill = False

    def __init__(self, model: TokenLM, weights: str = "fp32") -> None:
        self.model, self.weights, self.reason = model, weights, "as requested"

    @abstractmethod
    def bind(self, state: LMState, n_items: int, n_conditional: int | None = None) -> Steps:
        """Steps from this state on; arguments as of `Steps`."""

    def prefill_context(self) -> AbstractContextManager[None]:
        """The context of the model's prefill."""
        return nullcontext()

    def n_rows(self, rows: int) -> int:
        """Rows that a state needs, so that no row's result depends on the others."""
        return rows

    def draw(self, logits: Tensor, uniforms: Tensor, sampling: Sampling, guided: bool) -> Tensor:
        """Guidance, filters and the draw: logits of all rows, [.., K, V'], and uniforms [B, K] -> tokens [B, K]. With
        guidance the B null rows follow the B conditional ones."""
        batch = len(uniforms)
        logits = filters.without_special(logits, self.model.config.codebook_size).float()
        conditional = logits[:batch]
        if guided:
            null = logits[batch : 2 * batch]
            conditional = null.lerp(conditional, sampling.guidance_scale)  # null + scale * (conditional - null)
        logits = filters.top_k(filters.temperature(conditional, sampling.temperature), sampling.top_k)
        return filters.draw(filters.min_p(filters.top_p(logits, sampling.top_p), sampling.min_p), uniforms)

    def description(self) -> dict[str, str]:
        """For the metadata of what it generates."""
        return {"name": self.name, "weights": self.weights, "reason": self.reason}


def check_parts(model: TokenLM, known: set[type]) -> None:
    """Raises Unavailable unless mixers and MLPs are of the known kinds, and no layer does more than its kind states."""
    for block in model.blocks:
        for sublayer in block.sublayers:
            if type(sublayer.inner) not in known:
                raise Unavailable(f"it does not have {type(sublayer.inner).__name__}")
    for name, module in model.named_modules():
        layer = getattr(module, "weight", None) is not None and "proj" in name
        if (isinstance(module, nn.Linear) or layer) and type(module) not in (nn.Linear, Linear, Int8Linear):
            raise Unavailable(f"a layer is a {type(module).__name__} ({name})")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unavailable(f"{name or 'the model'} has hooks")


class AddedEmbeddings:
    """What a model adds to the embedded codes of a position: controls and position embeddings. Those of an item's
    tempo, key and metre, and those of a row without controls, are computed once."""

    def __init__(self, model: TokenLM) -> None:
        self.model, config = model, model.config
        by_frame = config.chroma or config.bar_position or config.timing
        self.by_position = by_frame or config.positions in ("sinusoidal", "joint")
        self.is_empty = not (self.by_position or config.tempo or config.key or config.metre)
        self._known: tuple[Controls, list[list[Tensor]]] = Controls(), []  # of whole items: controls, embeddings
        self._null: Tensor | None = None  # [1, 1, D]
        # The last block's controls, its first index, the position of index 0, and its embeddings [n, rows, D].
        self._block: tuple[Controls | None, int, int, Tensor] = None, 0, 0, torch.empty(0)

    @torch.inference_mode()
    def compute(self, steps: Steps, controls: Controls, index: int, count: int) -> Tensor:
        """Embeddings of the next `count` positions of `steps`, float32 [count, rows, D], or [1, rows, D] if they are
        the same at all positions; `controls` and `index` as of `Steps.step`. Those of the whole block are kept."""
        length, before = (count, steps.state.position - index) if self.by_position else (1, 0)
        first = index if self.by_position else 0
        known, start, shift, found = self._block
        if known is not controls or shift != before or not start <= first <= start + len(found) - length:
            frames = [value.shape[-1] for name in FRAME_CHANNELS if (value := getattr(controls, name)) is not None]
            stop = max([first + length, *frames]) if self.by_position else 1
            found, start = self._embed(steps, controls, slice(first, stop), before), first
            self._block = controls, start, before, found
        return found[first - start : first - start + length]

    def _embed(self, steps: Steps, controls: Controls, block: slice, before: int) -> Tensor:
        """Embeddings of positions of a block, of which the first is position `before` of the state: [n, rows, D]. Row
        by row: the rounding of a linear layer depends on the number of rows."""
        length, state = block.stop - block.start, steps.state
        controls = controls.select_frames(block)
        controls.check(self.model.config, "language model", steps.n_items, length)
        positions = torch.arange(block.start + before, block.stop + before, device=steps.item_of_row.device)
        n_text = [None] * state.batch_size if state.n_text is None else state.n_text.split(1)
        if all(value is None for value in vars(controls).values()):
            of_items = [self._without_controls()] * steps.n_items
        else:
            of_items = [self._of_item(controls, item) for item in range(steps.n_items)]  # [1, n, D]
        rows = []
        for row in range(state.batch_size):
            is_null = steps.n_conditional is not None and row >= steps.n_conditional
            x = self._without_controls() if is_null else of_items[row % steps.n_items]
            rows.append(self.model.add_positions(x.expand(1, length, -1), positions, n_text[row]))
        return torch.cat(rows).transpose(0, 1).float().contiguous()

    def _of_item(self, controls: Controls, item: int) -> Tensor:
        """[1, n, D]."""
        own = controls.select_rows(slice(item, item + 1))
        x = self.model.embedding.weight.new_zeros(1, 1, self.model.config.d_model)
        for embedding in self.model.embed_frames(own):
            x = x + embedding
        known, found = self._known
        if any(getattr(known, name) is not getattr(controls, name) for name in ("bpm", "key", "metre")):
            known, found = self._known = controls, []
        while len(found) <= item:
            next_item = controls.select_rows(slice(len(found), len(found) + 1))
            found.append([embedding[:, None] for embedding in self.model.embed_items(next_item)])  # of [1, 1, D]
        for embedding in found[item]:
            x = x + embedding
        return x

    def _without_controls(self) -> Tensor:
        """[1, 1, D]."""
        if self._null is None:
            self._null = self._of_item(Controls(), 0)
        return self._null
