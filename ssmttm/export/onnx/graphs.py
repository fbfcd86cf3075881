"""The graphs of a model: the text encoder, what the language model makes of a text, its step, the codec's decoder.

Each is a function of tensors alone, so that it can be traced. Shapes: B rows, L text tokens, E text width, D model
width, K codebooks, V codes a codebook, T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.codecs import Codec
from ssmttm.export.onnx.modules import exportable
from ssmttm.export.onnx.states import FREE_AXES, growing, named, refilled
from ssmttm.models.blocks import CrossAttentionSublayer, SublayerState
from ssmttm.models.token_lm import TokenLM
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder

POSITION = "position"


class Graph(nn.Module):
    """A module whose inputs and outputs have names; it is called with all inputs in order.

    Attributes:
        examples: an input of each name, to trace with.
        axes: the free axes of each input, by what they count.
        outputs: the names of what comes out.
    """

    examples: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: list[str]


class EncoderGraph(Graph):
    """input_ids and attention_mask [B, L] -> text [B, L, E]."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder, self.weights = encoder, encoder.model
        self.examples = {name: torch.ones(2, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        self.axes = {name: {0: "batch", 1: "tokens"} for name in self.examples}
        self.outputs = ["text"]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encoder._states(*inputs)


class ConditionGraph(Graph):
    """text [B, L, E] and mask [B, L] (False: padding) -> what the step reads of it, the same at every position: the
    tokens of a text prefix [B, L, D], or keys and values of cross-attention and modulations, by their names."""

    def __init__(self, model: TokenLM) -> None:
        super().__init__()
        self.model, self.as_prefix = model, model.config.conditioning == "prefix"
        mask = torch.ones(2, 3, dtype=torch.bool)
        self.examples = {"text": torch.zeros(2, 3, model.config.text_dim), "mask": mask}
        self.axes = {name: {0: "batch", 1: "tokens"} for name in self.examples}
        self.outputs = list(self._add_controls(*self.examples.values()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._add_controls(*inputs).values())

    def _add_controls(self, text: Tensor, mask: Tensor) -> dict[str, Tensor]:
        projected = self.model.text(TextCondition(text, mask))
        if self.as_prefix:
            return {"prefix": projected.tokens}

        def state(sublayer: Any) -> SublayerState:
            is_cross = isinstance(sublayer, CrossAttentionSublayer)
            keys = sublayer.inner.project_keys(*projected) if is_cross else None
            return SublayerState(keys, None if sublayer.adaln is None else sublayer.adaln(projected.mean()))

        return named([[state(sublayer) for sublayer in block.sublayers] for block in self.model.blocks])


class StepGraph(Graph):
    """One position: codes [B, K] and the states before it -> logits [B, K, V] and the states behind it.

    With a text prefix also prefix [B, D] and is_prefix [B]: a row where it is True reads this token in place of codes.
    Where the model counts positions, `position` [B] is one of the states. What `ConditionGraph` gives goes in as it is
    and does not come out.
    """

    def __init__(self, model: TokenLM) -> None:
        super().__init__()
        self.model, config = model, model.config
        start = model.init_state(2)
        model.step(torch.zeros(2, config.n_codebooks, dtype=torch.int64), start)  # prepares what no later step changes
        self.blocks = growing(start.blocks)
        told = set(ConditionGraph(model).outputs)
        states = named(self.blocks)
        if config.positions in ("sinusoidal", "joint"):
            states[POSITION] = torch.zeros(2, dtype=torch.int64)
        self.examples = {"codes": torch.zeros(2, config.n_codebooks, dtype=torch.int64)}
        if config.conditioning == "prefix":
            self.examples |= {"prefix": torch.zeros(2, config.d_model), "is_prefix": torch.zeros(2, dtype=torch.bool)}
        self.examples |= states
        self.axes = {name: {0: "batch", **FREE_AXES.get(name.rpartition(".")[2], {})} for name in self.examples}
        self.carried = [name for name in states if name not in told]
        self.outputs = ["logits", *(f"next.{name}" for name in self.carried)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.examples, inputs, strict=True))
        model, blocks = self.model, refilled(self.blocks, given)
        x = model.embedding(given["codes"] + model.offsets).sum(1)  # [B, D]
        x = model._add_controls(x[:, None], None)[:, 0]
        if "prefix" in given:
            x = torch.where(given["is_prefix"][:, None], given["prefix"], x)
        if POSITION in given:
            x = model._add_positions(x, given[POSITION], None)
        for block, states in zip(model.blocks, blocks, strict=True):
            x = block.step(x, states)
        behind = named(blocks)
        if POSITION in given:
            behind[POSITION] = given[POSITION] + 1
        return model._logits(x)[..., : model.config.codebook_size], *(behind[name] for name in self.carried)


class DecoderGraph(Graph):
    """codes [B, K, T] -> wav [B, 1, T * hop_length]."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = exportable(codec)
        self.examples = {"codes": torch.zeros(2, codec.n_codebooks, 7, dtype=torch.int64)}
        self.axes = {"codes": {0: "batch", 2: "frames"}}
        self.outputs = ["wav"]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.codec._decode(*inputs)
