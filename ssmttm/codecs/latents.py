"""Mean and standard deviation of a codec's latents per codebook, from the counts of its codes.

Shapes: K codebooks, V entries per codebook, c codebook width.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class LatentStatistics(NamedTuple):
    """mean, std: float32 [K]; over all frames and all c channels of a codebook."""

    mean: Tensor
    std: Tensor

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the values."""
        return hashlib.sha256(torch.cat([self.mean, self.std]).float().cpu().numpy().tobytes()).hexdigest()[:16]


def latent_statistics(books: Tensor, counts: Tensor) -> LatentStatistics:
    """Statistics of latents whose codes occur `counts` [K, V] times; books [K, V, c]."""
    frequencies = counts.double() / counts.sum(1, keepdim=True)  # [K, V]
    books = books.detach().double().cpu()
    mean = (frequencies * books.mean(-1)).sum(1)
    square = (frequencies * books.square().mean(-1)).sum(1)
    return LatentStatistics(mean.float(), (square - mean.square()).clamp_min(1e-12).sqrt().float())
