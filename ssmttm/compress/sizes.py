"""Size and cost of each part of a system, computed in the same way for teacher and student.

Counted as in TinyTTM (arXiv 2406.17159): text encoder, language model and codec decoder, without the codec's encoder; a
second stage beside them, and the decoder is that of the VAE whose latents it generates, if it does.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.codecs.students.cost import decoding_cost
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.generation.second_stage import SecondStage
from ssmttm.models.token_lm import TokenLM
from ssmttm.ops.int8 import Int8Linear
from ssmttm.reports.tables import markdown_table
from ssmttm.text.condition import TextCondition

PROMPT = "a slow waltz in D minor on a music box, with a warm pad behind it"
SECONDS = 10.0  # duration over which the cost of the text and the weights is averaged


class Component(NamedTuple):
    """Size and cost of one part of a system, per second of audio of a clip of 10 s."""

    name: str
    parameters: int  # used in generation
    stored: int  # bytes of the parameters in memory
    flops: float  # of matrix products, convolutions and LSTMs
    read: float  # bytes of weights and states, read and written


def components(pipe: MusicPipeline) -> list[Component]:
    """The parts of a pipeline, with the second stage of a two-stage model at the end; with guidance the language model
    runs on two rows, which share its weights."""
    with FlopCounterMode(display=False) as counter:
        text = pipe.text_encoder.encode([PROMPT])
    count, stored = _count_weights(pipe.text_encoder.model)
    encoder = Component("text encoder", count, stored, counter.get_total_flops() / SECONDS, stored / SECONDS)
    count, flops = decoding_cost(pipe.decoder)
    decoder = Component(f"{pipe.decoder.kind} decoder", count, 4 * count, flops, 4 * count / SECONDS)
    parts = [encoder, _language_model(pipe, text), decoder]
    return parts if pipe.second_stage is None else [*parts, _second_stage(pipe.second_stage, text)]


def comparison(teacher: Sequence[Component], student: Sequence[Component]) -> str:
    """A Markdown table of all parts and their total, with reduction factors."""
    rows = [["", "M parameters", "MB", "MFLOP per second", "MB read per second"]]
    for old, new in [*zip(teacher, student, strict=True), (total(teacher), total(student))]:
        rows.append([old.name, *map(_reduction, old[1:], new[1:])])
    return markdown_table(rows)


def total(parts: Sequence[Component]) -> Component:
    """The sum of all parts."""
    return Component("all", *(sum(values) for values in list(zip(*parts, strict=True))[1:]))


def _reduction(old: float, new: float) -> str:
    """Both in millions, and their ratio."""
    factor = f" ({old / new:.1f}x smaller)" if new else ""
    return f"{old / 1e6:,.1f} → {new / 1e6:,.1f}{factor}"


def _language_model(pipe: MusicPipeline, text: TextCondition) -> Component:
    model, rows = pipe.model, 1 if pipe.guidance_scale == 1 else 2
    positions = pipe.pattern.sequence_length(round(SECONDS * pipe.codec.frame_rate))
    (count, stored), (_, embedding) = _count_weights(model), _count_weights(model.embedding)
    bytes_per_step = stored - embedding + 2 * rows * _state_bytes(model, text, positions // 2)
    flops = rows * model.flops(positions, text.mask.shape[1]) / SECONDS
    return Component("language model", count, stored, flops, bytes_per_step * positions / SECONDS)


def _second_stage(stage: SecondStage, text: TextCondition) -> Component:
    """Of full windows, whose known frames are computed again in each. The codebooks that it reads are counted here if
    no codec decodes."""
    settings, (count, stored) = stage.settings, _count_weights(stage.model)
    if stage.vae is not None:
        books = stage.codec.codebook_vectors()[: stage.model.config.n_coarse_codebooks]
        count, stored = count + books.numel(), stored + 4 * books.numel()
    scale, coarse_scale = settings.guidance_scale, settings.coarse_guidance_scale
    passes = sum(map(bool, (scale, coarse_scale - scale, 1 - coarse_scale)))  # those of `guided_predictor`
    windows = stage.codec.frame_rate / (settings.window - settings.overlap)  # a second
    evaluations = windows * settings.sampler.n_evaluations
    flops = evaluations * passes * stage.model.flops(settings.window, text.mask.shape[1])
    return Component("second stage", count, stored, flops, evaluations * stored)


def _state_bytes(model: TokenLM, text: TextCondition, positions: int) -> int:
    """State of one row after so many positions (a KV cache grows)."""
    state = model.init_state(1)
    model.prefill(torch.zeros(1, model.config.n_codebooks, positions, dtype=torch.long), text, state)
    return _tensor_bytes(state.blocks)


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested lists and dataclasses."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):
        return sum(map(_tensor_bytes, value))
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


def _count_weights(module: nn.Module) -> tuple[int, int]:
    """Number of parameters, int8 weights included, and their bytes."""
    tensors = [*module.parameters(), *(part.int8 for part in module.modules() if isinstance(part, Int8Linear))]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
