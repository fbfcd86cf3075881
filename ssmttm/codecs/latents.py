"""Mean and spread of a codec's latents, codebook by codebook, from how often each code occurs.

Shapes: K codebooks, V codes a codebook, c width of a codebook.
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
        """16 hex digits over the values."""
        return hashlib.sha256(torch.cat([self.mean, self.std]).float().cpu().numpy().tobytes()).hexdigest()[:16]


def latent_statistics(books: Tensor, counts: Tensor) -> LatentStatistics:
    """Statistics of latents whose codes occur `counts` [K, V] times in all; books [K, V, c]."""
    shares = counts.double() / counts.sum(1, keepdim=True)  # [K, V]
    books = books.detach().double().cpu()
    mean = (shares * books.mean(-1)).sum(1)
    square = (shares * books.square().mean(-1)).sum(1)
    return LatentStatistics(mean.float(), (square - mean.square()).clamp_min(1e-12).sqrt().float())
