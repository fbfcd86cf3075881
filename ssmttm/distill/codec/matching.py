"""A student decoder against its codec's decoder inside: what comes out of their stages.

Shapes: B batch, T frames of a stage, D channels of the student's, W of the teacher's.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.spectral import Stack
from ssmttm.distill.losses import output_error

_FEWEST = 1e-6  # singular values below this share of the largest count as none


def matched_stages(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[int]:
    """Which of a teacher's stages each of its student's answers to: that whose frames come at the nearest rate, the
    deepest of such.

    Args:
        ours, theirs: what comes out of the stages for the same codes, [B, T, .] each.
    """
    apart = [[abs(math.log(a.shape[1] / b.shape[1])) for b in theirs] for a in ours]
    return [max(range(len(row)), key=lambda i: (-round(row[i], 2), i)) for row in apart]


@contextlib.contextmanager
def traced_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While it is open, what comes out of these modules, [B, T, D] each, in the order in which they run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(output if isinstance(module, Stack) else output.transpose(1, 2))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class StageProjections(nn.ModuleList):
    """One linear map [B, T, D] -> [B, T, W] for each stage of the student, which begins as the best there is."""

    @classmethod
    @torch.no_grad()
    def fitted(cls, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> "StageProjections":
        """By least squares, from the stages' outputs for the same codes, [B, T, D] and [B, T, W]."""
        projections = cls(nn.Linear(a.shape[-1], b.shape[-1]) for a, b in zip(ours, theirs, strict=True))
        for linear, a, b in zip(projections, ours, theirs, strict=True):
            a, b = (x.double().cpu() for x in at_one_rate(a, b))
            scale = b.square().sum((1, 2), keepdim=True).clamp_min(1e-12).rsqrt()  # all items count alike
            inputs, outputs = ((scale * x).flatten(0, 1) for x in (F.pad(a, (0, 1), value=1.0), b))
            solution = torch.linalg.lstsq(inputs, outputs, rcond=_FEWEST, driver="gelsd").solution  # [D + 1, W]
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])
        return projections

    def forward(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """Mean over stages of the square error as a share of the teacher's energy, item by item: [B]."""
        errors = []
        for linear, a, b in zip(self, ours, theirs, strict=True):
            a, b = at_one_rate(a, b)
            errors.append(output_error(linear(a).float(), b.float()))
        return torch.stack(errors).mean(0)


def at_one_rate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs [B, T, .], [B, T', .] of one stretch of time, the quicker one averaged down to the other's frames."""
    frames = min(a.shape[1], b.shape[1])
    return tuple(
        x if x.shape[1] == frames else F.adaptive_avg_pool1d(x.transpose(1, 2), frames).transpose(1, 2) for x in (a, b)
    )
