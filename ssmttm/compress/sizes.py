"""What each part of a system weighs and costs, the same way for teacher and student.

Counted as TinyTTM counts (arXiv 2406.17159): text encoder, language model and codec decoder; a codec's encoder plays no
part in making music.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.students.cost import decoding_cost
from ssmttm.evaluation.metrics.metric import markdown
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.models.token_lm import TokenLM
from ssmttm.ops.int8 import Int8Linear
from ssmttm.text.condition import TextCondition

PROMPT = "a slow waltz in D minor on a music box, with a warm pad behind it"
SECONDS = 10.0  # of the piece over which the text's cost is spread


class Component(NamedTuple):
    """parameters: of what making music needs. stored: bytes of these as they are held. flops: for a second of audio, of
    matrix products, convolutions and LSTMs. read: bytes of weights and states, read and written, for a second of audio
    of a piece of 10 s made in one go, its codes decoded together."""

    name: str
    parameters: int
    stored: int
    flops: float
    read: float


def components(pipe: MusicPipeline) -> list[Component]:
    """Of a pipeline as it is sampled: with guidance the language model runs on two rows, which share its weights."""
    with FlopCounterMode(display=False) as counter:
        text = pipe.text_encoder.encode([PROMPT])
    count, stored = _weights(pipe.text_encoder.model)
    encoder = Component("text encoder", count, stored, counter.get_total_flops() / SECONDS, stored / SECONDS)
    count, flops = decoding_cost(pipe.codec)
    decoder = Component("codec decoder", count, 4 * count, flops, 4 * count / SECONDS)
    return [encoder, _language_model(pipe, text), decoder]


def comparison(teacher: Sequence[Component], student: Sequence[Component]) -> str:
    """A table in Markdown, part by part and all together; how many times less each is."""
    rows = [["", "M parameters", "MB", "MFLOP a second", "MB read a second"]]
    for old, new in [*zip(teacher, student, strict=True), (total(teacher), total(student))]:
        rows.append([old.name, *map(_change, old[1:], new[1:])])
    return markdown(rows)


def total(parts: Sequence[Component]) -> Component:
    """All of them together."""
    return Component("all", *(sum(values) for values in list(zip(*parts, strict=True))[1:]))


def _change(old: float, new: float) -> str:
    """In millions."""
    less = f" ({old / new:.1f} x less)" if new else ""
    return f"{old / 1e6:,.1f} → {new / 1e6:,.1f}{less}"


def _language_model(pipe: MusicPipeline, text: TextCondition) -> Component:
    model, rows = pipe.model, 1 if pipe.guidance_scale == 1 else 2
    positions = pipe.pattern.sequence_length(round(SECONDS * pipe.codec.frame_rate))
    (count, stored), (_, looked_up) = _weights(model), _weights(model.embedding)
    a_step = stored - looked_up + 2 * rows * _state_bytes(model, text, positions // 2)
    flops = rows * model.flops(positions, text.mask.shape[1]) / SECONDS
    return Component("language model", count, stored, flops, a_step * positions / SECONDS)


def _state_bytes(model: TokenLM, text: TextCondition, positions: int) -> int:
    """Of one row, after so many positions: caches of attention grow."""
    state = model.init_state(1)
    model.prefill(torch.zeros(1, model.config.n_codebooks, positions, dtype=torch.long), text, state)
    return _tensor_bytes(state.blocks)


def _tensor_bytes(value: Any) -> int:
    """Of all tensors in lists and dataclasses."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):
        return sum(map(_tensor_bytes, value))
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


def _weights(module: nn.Module) -> tuple[int, int]:
    """How many, those kept in int8 among them, and their bytes."""
    tensors = [*module.parameters(), *(part.int8 for part in module.modules() if isinstance(part, Int8Linear))]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
