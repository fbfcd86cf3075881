"""What a piece may be told besides its caption: a melody, as pitch classes by frame, and a tempo.

A model is built for either, both or none; where an item has none, a learnt vector stands in its place.
Shapes: B items, T frames (in a TokenLM positions), W width of an embedding.
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
    """A model's config, which says whether it was built for a melody, for a tempo."""

    chroma: bool
    tempo: bool


@dataclass(frozen=True)
class Controls:
    """One row an item.

    Attributes:
        chroma: [B, 12, T], strength of each pitch class in [0, 1], NaN where there is none; None: there is none.
        tempo: [B], beats a minute, NaN where it is not known; None: it is not known.
    """

    chroma: Tensor | None = None
    tempo: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> "Controls":
        """Those of some of the items."""
        return self._each(lambda part: part[rows])

    def repeat(self, n: int) -> "Controls":
        """All items n times, one below the other."""
        return self._each(lambda part: part.repeat(n, *[1] * (part.ndim - 1)))

    def to(self, device: torch.device | str) -> "Controls":
        return self._each(lambda part: part.to(device))

    def columns(self, columns: slice) -> "Controls":
        """With the chroma of some of its frames."""
        return self if self.chroma is None else replace(self, chroma=self.chroma[..., columns])

    def at(self, frames: Tensor) -> "Controls":
        """With the chroma of the frames of these numbers, int64 [S]; NaN before the melody's first, behind its last."""
        if self.chroma is None:
            return self
        length = self.chroma.shape[-1]
        padded = F.pad(self.chroma, (0, 1), value=torch.nan)  # [B, 12, T + 1]
        return replace(self, chroma=padded[..., frames.where((frames >= 0) & (frames < length), length)])

    def supported_by(self, config: SupportsControls) -> "Controls":
        """Those that a model of this config was built for."""
        return Controls(self.chroma if config.chroma else None, self.tempo if config.tempo else None)

    def check(self, config: SupportsControls, name: str, batch: int, length: int) -> None:
        """Check that a model can be told them.

        Args:
            config: the model's.
            name: what kind of model it is.
            batch, length: B and T of what else it is told.

        Raises:
            UserError: it was not built for one of them, or a shape is another.
        """
        wanted = {"chroma": (batch, N_PITCH_CLASSES, length), "tempo": (batch,)}
        for part, shape in wanted.items():
            given = getattr(self, part)
            if given is not None and not getattr(config, part):
                raise UserError(f"this {name} was not trained with {part}: leave it out, or set model.{part}=true")
            if given is not None and tuple(given.shape) != shape:
                raise UserError(f"the {part} is {list(given.shape)}, the {name} takes {list(shape)}")

    def _each(self, of: Callable[[Tensor], Tensor]) -> "Controls":
        return Controls(*(None if part is None else of(part) for part in (self.chroma, self.tempo)))


class ChromaEmbedding(nn.Module):
    """A linear map of the pitch classes of each frame, and a learnt vector where there are none."""

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


class TempoEmbedding(nn.Module):
    """A network of the tempo on a logarithmic scale, and a learnt vector where it is not known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.number = SinusoidalEmbedding(width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, bpm: Tensor | None) -> Tensor:
        """[B] -> [B, W]; None -> [1, W]."""
        if bpm is None:
            return self.null[None]
        hundredths = 100 * bpm.nan_to_num(1.0).log2()  # of an octave
        return torch.where(bpm.isnan()[:, None], self.null, self.number(hundredths))

    def flops(self) -> int:
        return self.number.flops()
