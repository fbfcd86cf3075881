"""Key, mode and tonal clarity from chroma. Shapes: T frames of `features.chroma_log_frequency`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssmttm.evaluation.attributes.classifiers import TONICS

# How well each pitch class fits a key of C (Krumhansl, Cognitive Foundations of Musical Pitch, 1990, table 2.1).
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


class Key(NamedTuple):
    """Tonic such as "F#"; mode, major or minor; clarity, the correlation with the key's profile, -1 to 1."""

    tonic: str
    mode: str
    clarity: float


def key(chroma: Tensor) -> Key | None:
    """The key whose profile correlates best with the mean chroma [12, T]; None in silence."""
    mean = chroma.mean(-1)
    if float(mean.sum()) <= 0 or float(mean.std()) <= 1e-9:
        return None
    profiles = torch.tensor([MAJOR, MINOR])
    rotated = torch.stack([profiles.roll(i, 1) for i in range(12)], 1)  # [2, 12 tonics, 12]
    rotated = rotated - rotated.mean(-1, keepdim=True)
    centred = mean - mean.mean()
    correlation = (rotated @ centred) / (rotated.norm(dim=-1) * centred.norm())  # [2, 12]
    best = int(correlation.argmax())
    return Key(TONICS[best % 12], ("major", "minor")[best // 12], float(correlation.flatten()[best]))


def chroma_entropy(chroma: Tensor) -> float:
    """Entropy of the pitch classes of a clip [12, T] in bits, from 0 (one note) to log2 12 = 3.58; NaN in silence."""
    total = chroma.sum(-1).double()
    if float(total.sum()) <= 0:
        return math.nan
    p = total / total.sum()
    return float(-(p * p.clamp_min(1e-12).log2()).sum())
