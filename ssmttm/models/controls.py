"""Optional music controls: a per-frame chroma melody and a tempo.

A model is built for either, both or none. Where an item has none, a learnt null vector takes its place.
Shapes: B items, T frames (positions in a TokenLM), W embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.errors import UserError
from ssmttm.models.conditioning import SinusoidalEmbedding
from ssmttm.ops.linear import Linear

N_PITCH_CLASSES = 12


class SupportsControls(Protocol):
    """The fields of a model's config that say which controls it was built with."""

    chroma: bool
    tempo: bool


@dataclass(frozen=True)
class Controls:
    """Controls of a batch. chroma: [B, 12, T], strength of each pitch class in [0, 1]. tempo: [B], beats per minute.

    NaN where an item has none; None where no item has one.
    """

    chroma: Tensor | None = None
    tempo: Tensor | None = None

    def select_rows(self, rows: slice | Tensor) -> "Controls":
        """Controls of some of the items."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, n: int) -> "Controls":
        """The batch n times: [n * B, ...]."""
        return self._map(lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)))

    def to(self, device: torch.device | str) -> "Controls":
        return self._map(lambda tensor: tensor.to(device))

    def select_frames(self, frames: slice) -> "Controls":
        """Controls with a slice of the melody's frames."""
        return self if self.chroma is None else replace(self, chroma=self.chroma[..., frames])

    def gather_frames(self, frames: Tensor) -> "Controls":
        """Controls with the melody at the given frame numbers, int64 [S]; NaN outside the melody."""
        if self.chroma is None:
            return self
        length = self.chroma.shape[-1]
        padded = F.pad(self.chroma, (0, 1), value=torch.nan)  # [B, 12, T + 1]
        return replace(self, chroma=padded[..., frames.where((frames >= 0) & (frames < length), length)])

    def supported_by(self, config: SupportsControls) -> "Controls":
        """Only the controls that a model of this config was built with."""
        return Controls(self.chroma if config.chroma else None, self.tempo if config.tempo else None)

    def check(self, config: SupportsControls, name: str, batch: int, length: int) -> None:
        """Raises UserError if the model (`name` in the message) was not built with one of them, or a shape is wrong."""
        expected: dict[str, tuple[int, ...]] = {"chroma": (batch, N_PITCH_CLASSES, length), "tempo": (batch,)}
        for key, shape in expected.items():
            value = getattr(self, key)
            if value is not None and not getattr(config, key):
                raise UserError(f"this {name} was not trained with {key}: leave it out, or set model.{key}=true")
            if value is not None and tuple(value.shape) != shape:
                raise UserError(f"the {name} takes {key} of shape {list(shape)}, got {list(value.shape)}")

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Controls":
        return Controls(*(None if tensor is None else function(tensor) for tensor in (self.chroma, self.tempo)))


class ChromaEmbedding(nn.Module):
    """A linear map of each frame's pitch classes; a learnt vector where there are none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(N_PITCH_CLASSES, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, chroma: Tensor | None) -> Tensor:
        """[B, 12, T] -> [B, T, W]; None -> [1, 1, W]."""
        if chroma is None:
            return self.null[None, None]
        absent = chroma.isnan().any(1)[..., None]  # [B, T, 1]
        strengths = chroma.nan_to_num(0.0).transpose(1, 2).to(self.linear.weight.dtype)  # [B, T, 12]
        return torch.where(absent, self.null, self.linear(strengths))

    def flops(self, n_frames: int) -> int:
        return 2 * n_frames * self.linear.weight.numel()

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)


class TempoEmbedding(nn.Module):
    """A sinusoidal embedding of log tempo; a learnt vector where the tempo is absent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.number = SinusoidalEmbedding(width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, bpm: Tensor | None) -> Tensor:
        """[B] -> [B, W]; None -> [1, W]."""
        if bpm is None:
            return self.null[None]
        hundredths = 100 * bpm.nan_to_num(1.0).log2()  # hundredths of an octave
        return torch.where(bpm.isnan()[:, None], self.null, self.number(hundredths))

    def flops(self) -> int:
        return self.number.flops()

    def init_weights(self, std: float) -> None:
        self.number.init_weights(std)
