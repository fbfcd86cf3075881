"""Matching of the stages of a student decoder and its teacher's.

Shapes: B batch, T frames of a stage, D student channels, W teacher channels.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.spectral import Stack
from ssmttm.distill.losses import output_error

_RCOND = 1e-6  # singular values below this fraction of the largest are treated as 0


def matched_stages(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[int]:
    """The teacher stage for each student stage, from their outputs [B, T, .] for the same codes: the one with the
    nearest frame rate, the deepest of equals."""
    matches = []
    for output in student:
        distances = [round(abs(math.log(output.shape[1] / other.shape[1])), 2) for other in teacher]
        matches.append(max(index for index, distance in enumerate(distances) if distance == min(distances)))
    return matches


@contextlib.contextmanager
def traced_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the outputs of modules, [B, T, D] each in the order of execution, while the context is open."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        outputs.append(output if isinstance(module, Stack) else output.transpose(1, 2))

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(record))
        yield outputs


class StageProjections(nn.ModuleList):
    """One linear map [B, T, D] -> [B, T, W] for each matched stage."""

    @classmethod
    @torch.no_grad()
    def fitted(cls, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> "StageProjections":
        """Least-squares fit to outputs for the same codes, [B, T, D] and [B, T, W]."""
        linears = []
        for ours, theirs in zip(student, teacher, strict=True):
            linear = nn.Linear(ours.shape[-1], theirs.shape[-1])
            x, y = (output.double().cpu() for output in match_frame_rates(ours, theirs))
            scale = y.square().sum((1, 2), keepdim=True).clamp_min(1e-12).rsqrt()  # equal weight for every item
            inputs, outputs = (scale * F.pad(x, (0, 1), value=1.0)).flatten(0, 1), (scale * y).flatten(0, 1)
            solution = torch.linalg.lstsq(inputs, outputs, rcond=_RCOND, driver="gelsd").solution  # [D + 1, W]
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])
            linears.append(linear)
        return cls(linears)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """`output_error` of the projected outputs, mean over stages: [B]."""
        errors = []
        for linear, ours, theirs in zip(self, student, teacher, strict=True):
            ours, theirs = match_frame_rates(ours, theirs)
            errors.append(output_error(linear(ours).float(), theirs.float()))
        return torch.stack(errors).mean(0)


def match_frame_rates(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, .] and [B, T', .] of the same duration, the longer one average-pooled to the shorter."""
    frames = min(a.shape[1], b.shape[1])
    return _pool(a, frames), _pool(b, frames)


def _pool(x: Tensor, frames: int) -> Tensor:
    return x if x.shape[1] == frames else F.adaptive_avg_pool1d(x.transpose(1, 2), frames).transpose(1, 2)
