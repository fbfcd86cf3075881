"""The graphs of a model: text encoder, text condition, language model step and codec decoder.

Each is a function of tensors, so that it can be traced. Shapes: B rows, L text tokens, E text width, D model width,
K codebooks, V codes per codebook, T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.codecs import Codec
from ssmttm.export.onnx.modules import exportable
from ssmttm.export.onnx.states import FREE_AXES, named_tensors, with_growing_caches, with_tensors
from ssmttm.models.blocks import CrossAttentionSublayer, SublayerState
from ssmttm.models.token_lm import TokenLM
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder

POSITION = "position"


class Graph(nn.Module):
    """A module with named inputs and outputs; it is called with all inputs in order.

    Attributes:
        examples: example inputs by name, for tracing.
        axes: the free axes of each input, with their names.
        outputs: names of the outputs.
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
    """text [B, L, E] and mask [B, L] (False: padding) -> the condition of every step: the tokens of a text prefix
    [B, L, D], or keys and values of cross-attention and adaLN parameters, by name."""

    def __init__(self, model: TokenLM) -> None:
        super().__init__()
        self.model, self.as_prefix = model, model.config.conditioning == "prefix"
        mask = torch.ones(2, 3, dtype=torch.bool)
        self.examples = {"text": torch.zeros(2, 3, model.config.text_dim), "mask": mask}
        self.axes = {name: {0: "batch", 1: "tokens"} for name in self.examples}
        self.outputs = list(self._condition(*self.examples.values()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._condition(*inputs).values())

    def _condition(self, text: Tensor, mask: Tensor) -> dict[str, Tensor]:
        projected = self.model.text(TextCondition(text, mask))
        if self.as_prefix:
            return {"prefix": projected.tokens}

        def state(sublayer: Any) -> SublayerState:
            is_cross = isinstance(sublayer, CrossAttentionSublayer)
            keys = sublayer.inner.project_keys(*projected) if is_cross else None
            return SublayerState(keys, None if sublayer.adaln is None else sublayer.adaln(projected.mean()))

        return named_tensors([[state(sublayer) for sublayer in block.sublayers] for block in self.model.blocks])


class StepGraph(Graph):
    """One position: codes [B, K] and the states before it -> logits [B, K, V] and the states after it.

    With a text prefix also prefix [B, D] and is_prefix [B]: a row where it is True has this token in place of codes. If
    the model has positions, `position` [B] is one of the states. The outputs of `ConditionGraph` are inputs, unchanged.
    """

    def __init__(self, model: TokenLM) -> None:
        super().__init__()
        self.model, config = model, model.config
        start = model.init_state(2)
        model.step(torch.zeros(2, config.n_codebooks, dtype=torch.int64), start)  # sets states that stay constant
        self.blocks = with_growing_caches(start.blocks)
        condition = set(ConditionGraph(model).outputs)
        states = named_tensors(self.blocks)
        if config.positions in ("sinusoidal", "joint"):
            states[POSITION] = torch.zeros(2, dtype=torch.int64)
        self.examples = {"codes": torch.zeros(2, config.n_codebooks, dtype=torch.int64)}
        if config.conditioning == "prefix":
            self.examples |= {"prefix": torch.zeros(2, config.d_model), "is_prefix": torch.zeros(2, dtype=torch.bool)}
        self.examples |= states
        self.axes = {name: {0: "batch", **FREE_AXES.get(name.rpartition(".")[2], {})} for name in self.examples}
        self.carried = [name for name in states if name not in condition]
        self.outputs = ["logits", *(f"next.{name}" for name in self.carried)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(self.examples, inputs, strict=True))
        model, blocks = self.model, with_tensors(self.blocks, tensors)
        x = model.embedding(tensors["codes"] + model.offsets).sum(1)  # [B, D]
        x = model._add_controls(x[:, None], None)[:, 0]
        if "prefix" in tensors:
            x = torch.where(tensors["is_prefix"][:, None], tensors["prefix"], x)
        if POSITION in tensors:
            x = model.add_positions(x, tensors[POSITION], None)
        for block, states in zip(model.blocks, blocks, strict=True):
            x = block.step(x, states)
        next_states = named_tensors(blocks)
        if POSITION in tensors:
            next_states[POSITION] = tensors[POSITION] + 1
        return model._logits(x)[..., : model.config.codebook_size], *(next_states[name] for name in self.carried)


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
