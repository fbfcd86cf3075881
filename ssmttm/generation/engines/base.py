"""What every engine has: a decoding step on an LMState's memory, and the draw of tokens.

Shapes: B items, K codebooks, V' logits of a codebook, D model width. A state has as many rows as prompts and null
conditions together: row i belongs to item i % B. Null rows have no controls.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ssmttm.generation.engines import filters
from ssmttm.generation.engines.library import Unavailable
from ssmttm.generation.request import Sampling
from ssmttm.models.controls import Controls
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
    """What a model adds to the embedded codes of a position: controls and position embeddings."""

    def __init__(self, model: TokenLM) -> None:
        self.model, config = model, model.config
        by_frame = config.chroma or config.bar_position or config.timing
        self.by_position = by_frame or config.positions in ("sinusoidal", "joint")
        self.is_empty = not (self.by_position or config.tempo or config.key or config.metre)

    @torch.inference_mode()
    def compute(self, steps: Steps, controls: Controls, index: int, count: int) -> Tensor:
        """Embeddings of the next `count` positions of `steps`, float32 [count, rows, D], or [1, rows, D] if they are
        the same at all positions; `controls` and `index` as of `Steps.step`. Row by row: the rounding of a linear layer
        depends on the number of rows."""
        length, state = count if self.by_position else 1, steps.state
        rows = steps.controls_of_rows(controls, slice(index, index + length))
        positions = torch.arange(state.position, state.position + length, device=steps.item_of_row.device)
        n_text = [None] * state.batch_size if state.n_text is None else state.n_text.split(1)
        added = torch.cat([
            self.model.added_embeddings(positions, 1, n_text[row], rows.select_rows(slice(row, row + 1)))
            for row in range(state.batch_size)
        ])  # [rows, n, D]  # fmt: skip
        return added.transpose(0, 1).float().contiguous()
