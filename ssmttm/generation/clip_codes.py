"""Codes of clips, as both stages have them.

Shapes: B items, N coarse codebooks, K codebooks, C channels of a VAE's patches, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipCodes:
    """Codes of B clips of T frames.

    coarse: int64 [B, N, T], those of the language model. full: what the pipeline's decoder decodes: all codes, int64
    [B, K, T], of which the coarse ones are the first, or patches of a VAE's latents, float [B, C, T].
    """

    coarse: Tensor
    full: Tensor

    @classmethod
    def cat(cls, parts: Sequence["ClipCodes"], dim: int = -1) -> "ClipCodes":
        """Parts of the same clips, one after another; along `dim` 0 several clips of the same length."""
        return cls(torch.cat([part.coarse for part in parts], dim), torch.cat([part.full for part in parts], dim))

    @property
    def n_frames(self) -> int:
        return self.full.shape[-1]

    def frames(self, start: int, stop: int | None = None) -> "ClipCodes":
        """The frames from `start` on, up to `stop`; both as in a slice."""
        return ClipCodes(self.coarse[..., start:stop], self.full[..., start:stop])

    def items(self) -> list["ClipCodes"]:
        """Each clip alone."""
        pairs = zip(self.coarse.split(1), self.full.split(1), strict=True)
        return [ClipCodes(coarse, full) for coarse, full in pairs]

    def expand(self, n_items: int) -> "ClipCodes":
        """The codes of one clip for so many items."""
        return ClipCodes(self.coarse.expand(n_items, -1, -1), self.full.expand(n_items, -1, -1))

    def to(self, device: torch.device) -> "ClipCodes":
        return ClipCodes(self.coarse.to(device), self.full.to(device))
