"""Mean and standard deviation of a codec's latents per codebook, from the counts of its codes, and of a VAE's per
channel.

Shapes: K codebooks, V entries per codebook, c codebook width or channels, T frames.
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmttm.errors import UserError


class LatentStatistics(NamedTuple):
    """mean, std: float32 [K], over all frames and all c channels of a codebook; of a VAE [c], over all frames."""

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


def channel_statistics(segments: Iterable[np.ndarray], whose: str) -> LatentStatistics:
    """Statistics of a VAE's latents [c, T] of several segments. Raises UserError if one is not finite; `whose` is the
    name of the store."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for latents in segments:
        values = torch.from_numpy(latents.astype(np.float64))
        count, total, squares = count + values.shape[1], total + values.sum(1), squares + values.square().sum(1)
    if not bool(squares.isfinite().all()):
        raise UserError(f"{whose}: its latents contain NaN or infinite values: encode the store again")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return LatentStatistics(mean.float(), std.float())


def join_statistics(first: LatentStatistics, second: LatentStatistics) -> LatentStatistics:
    """The statistics of groups followed by those of others."""
    return LatentStatistics(torch.cat([first.mean, second.mean]), torch.cat([first.std, second.std]))
