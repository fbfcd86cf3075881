"""Student against teacher inside: streams behind mapped blocks, and single mixers fed with the teacher's own streams.

Mixer matching is the layer-wise step of MOHAWK (arXiv 2408.10189): each mixer of the student learns to say what its
teacher's says to the same input, before they have to work together.
Shapes: B batch, S positions, D width of the student, W of the teacher.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.distill.losses import hidden_state_distance, output_error
from ssmttm.errors import UserError
from ssmttm.models import TokenLM
from ssmttm.models.conditioning import ProjectedText
from ssmttm.ops.linear import Linear


class HiddenStateProjections(nn.ModuleList):
    """One linear map [B, S, D] -> [B, S, W] for each mapped block, of streams of unit size; they begin as identities,
    cut or filled with zeros where the widths differ."""

    def __init__(self, n: int, width: int, teacher_width: int) -> None:
        super().__init__(Linear(width, teacher_width, bias=False) for _ in range(n))
        for linear in self:
            nn.init.eye_(linear.weight)

    def forward(self, hidden_states: Sequence[Tensor], of_teacher: Sequence[Tensor]) -> Tensor:
        """Distances of the streams, mean over blocks: [B, S]."""
        pairs = zip(self, hidden_states, of_teacher, strict=True)
        return torch.stack([hidden_state_distance(p(F.rms_norm(s, s.shape[-1:])), t) for p, s, t in pairs]).mean(0)


@contextlib.contextmanager
def traced_mixers(teacher: TokenLM, numbers: Sequence[int]) -> Iterator[dict[int, tuple[Any, Tensor]]]:
    """While it is open, what goes into and comes out of the first mixer of these blocks, by number."""
    seen: dict[int, tuple[Any, Tensor]] = {}

    def keep(number: int) -> Any:
        return lambda module, inputs, output: seen.__setitem__(number, (inputs, output))

    handles = [teacher.blocks[n - 1].sublayers[0].register_forward_hook(keep(n)) for n in set(numbers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mixer_error(
    student: TokenLM,
    text: ProjectedText,
    audio: Tensor,
    numbers: Sequence[int],
    seen: dict[int, tuple[Any, Tensor]],
) -> Tensor:
    """Mean over the student's blocks of `output_error` of their first mixers, fed with what the teacher's were fed, at
    positions that hold text or audio: [B].

    Args:
        text: projected by the student.
        audio: bool [B, S], True at positions of the audio that are no padding.
        numbers: the teacher's block for each of the student's.
        seen: by `traced_mixers`.
    """
    real = audio_positions(text.mask, audio) if student.config.conditioning == "prefix" else audio
    errors = []
    for block, number in zip(student.blocks, numbers, strict=True):
        (x, _, _, mask), output = seen[number]
        ours = block.sublayers[0](x, text, None, mask)
        errors.append(output_error(*(y.masked_fill(~real[..., None], 0) for y in (ours, output))))
    return torch.stack(errors).mean(0)


def audio_positions(text: Tensor, audio: Tensor) -> Tensor:
    """Which positions are real once text [B, L] stands in front of audio [B, S], its padding last: [B, L + S]."""
    order = torch.argsort(~torch.cat([text, torch.ones_like(audio)], 1), dim=1, stable=True)
    return torch.cat([text, audio], 1).gather(1, order)


def check_mixers(student: TokenLM, teacher: TokenLM) -> None:
    """Raises UserError unless the mixers of both take the same streams."""
    for key in ("d_model", "conditioning"):
        ours, theirs = getattr(student.config, key), getattr(teacher.config, key)
        if ours != theirs:
            raise UserError(
                f"mixers are matched on the teacher's own streams, but its model.{key} is {theirs}, the student's "
                f"{ours}: set model.{key}={theirs}, or distill.mixer_steps=0"
            )
