"""Matching of hidden states after mapped blocks, and of single mixers on the teacher's inputs.

Mixer matching is the layer-wise stage of MOHAWK (arXiv 2408.10189): each mixer of the student learns the output of the
teacher's mixer for the same input.
Shapes: B batch, S positions, D student width, W teacher width.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.distill.losses import hidden_state_distance, output_error
from ssmttm.errors import UserError
from ssmttm.models import TokenLM
from ssmttm.models.conditioning import ProjectedText
from ssmttm.ops.linear import Linear

MixerTrace = Mapping[int, tuple[Any, Tensor]]  # block -> inputs and output of its first mixer


class HiddenStateProjections(nn.ModuleList):
    """One linear map [B, S, D] -> [B, S, W] of RMS-normalised hidden states for each mapped block, initialised to the
    identity (truncated, or padded with zeros)."""

    def __init__(self, n: int, width: int, teacher_width: int) -> None:
        linears = [Linear(width, teacher_width, bias=False) for _ in range(n)]
        super().__init__(linears)
        for linear in linears:
            nn.init.eye_(linear.weight)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Distance of the hidden states, mean over blocks: [B, S]."""
        distances = []
        for projection, ours, theirs in zip(self, student, teacher, strict=True):
            distances.append(hidden_state_distance(projection(F.rms_norm(ours, ours.shape[-1:])), theirs))
        return torch.stack(distances).mean(0)


@contextlib.contextmanager
def traced_mixers(teacher: TokenLM, blocks: Sequence[int]) -> Iterator[MixerTrace]:
    """Record inputs and output of the first mixer of these blocks while the context is open."""
    traced: dict[int, tuple[Any, Tensor]] = {}

    def record(block: int) -> Callable[..., None]:
        return lambda module, inputs, output: traced.__setitem__(block, (inputs, output))

    with contextlib.ExitStack() as hooks:
        for block in set(blocks):
            mixer = teacher.get_submodule(f"blocks.{block - 1}.sublayers.0")
            hooks.enter_context(mixer.register_forward_hook(record(block)))
        yield traced


def mixer_error(
    student: TokenLM, text: ProjectedText, audio: Tensor, blocks: Sequence[int], traced: MixerTrace
) -> Tensor:
    """`output_error` of the student's first mixers on their teacher's inputs, mean over blocks: [B]. text: projected by
    the student. audio: valid audio positions, bool [B, S]. blocks: the teacher block for each student block."""
    valid = valid_positions(text.mask, audio) if student.config.conditioning == "prefix" else audio
    errors = []
    for index, block in enumerate(blocks):
        (x, _, _, mask), theirs = traced[block]
        ours = student.get_submodule(f"blocks.{index}.sublayers.0")(x, text, None, mask)
        ours, theirs = (output.masked_fill(~valid[..., None], 0) for output in (ours, theirs))
        errors.append(output_error(ours, theirs))
    return torch.stack(errors).mean(0)


def valid_positions(text: Tensor, audio: Tensor) -> Tensor:
    """Mask of a sequence with the text [B, L] right-aligned before the audio [B, S], padding last: [B, L + S]."""
    order = torch.argsort(~torch.cat([text, torch.ones_like(audio)], 1), dim=1, stable=True)
    return torch.cat([text, audio], 1).gather(1, order)


def check_mixers(student: TokenLM, teacher: TokenLM) -> None:
    """Raises UserError unless the mixers of both take the same input."""
    for key in ("d_model", "conditioning"):
        ours, theirs = getattr(student.config, key), getattr(teacher.config, key)
        if ours != theirs:
            raise UserError(
                f"mixer matching needs equal inputs, but the teacher's model.{key} is {theirs} and the student's is "
                f"{ours}: set model.{key}={theirs}, or distill.mixer_steps=0"
            )
