"""Self-repetition: windows of a spectrogram that are similar to an earlier one, and the similarity at musical lags.

Shapes: T frames, M mels, P pitch classes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.audio.features import MEL_RATE, PITCH_RATE

_RATE = 10  # frames per second of the comparison
_REPEAT = 0.95  # correlation above which a window repeats another
BAR = (0.6, 4.8)  # seconds of a bar: two beats at 180 a minute to four at 50
PHRASE = (4.8, 20.0)  # seconds of two bars and more, within the clip
_OVERLAP = 2.0  # seconds that must be left to compare at the longest lag


class Repetition(NamedTuple):
    """Fraction of the windows of 1 s that repeat one at least 1 s earlier; seconds of the longest repeat."""

    fraction: float
    longest: float


def repetition(mel: Tensor) -> Repetition:
    """Self-repetition of a log-mel spectrogram [M, T] (`features.log_mel`); (0, 0) for silence and clips under 2 s."""
    frames = F.avg_pool1d(mel, MEL_RATE // _RATE).T  # [t, M]
    frames = frames - frames.mean(0)
    if len(frames) < 2 * _RATE or float(frames.abs().max()) < 1e-4:
        return Repetition(0.0, 0.0)
    windows = frames.unfold(0, _RATE, 1).flatten(1)  # [n, M * rate]
    windows = F.normalize(windows - windows.mean(1, keepdim=True), dim=1)
    repeats = (windows @ windows.T).tril(-_RATE) >= _REPEAT  # [n, n]: later window, earlier window
    longest = _longest_diagonal(repeats.numpy())
    return Repetition(
        fraction=float(repeats[_RATE:].any(1).float().mean()),
        longest=(longest + _RATE - 1) / _RATE if longest else 0.0,
    )


class LagSimilarity(NamedTuple):
    """Similarity of a clip to itself at the best lag of a bar and of a phrase: 0 for unrelated frames, 1 for copies."""

    bar: float
    phrase: float


def lag_similarity(mel: Tensor, chroma: Tensor) -> LagSimilarity:
    """Self-similarity over lags, from timbre and rhythm (log-mel) and from pitch (chroma) alike.

    At each lag the similarity is averaged over time; a loop has a peak at its length, music whose bars are unrelated
    has none. NaN where the clip is shorter than the shortest lag and `_OVERLAP`, and in silence.

    Args:
        mel: [M, T] at MEL_RATE. chroma: [12, T] at PITCH_RATE.
    """
    parts = [F.avg_pool1d(mel, MEL_RATE // _RATE), F.avg_pool1d(chroma, PITCH_RATE // _RATE)]
    length = min(part.shape[-1] for part in parts)
    similarity = torch.stack([similarity_matrix(part[:, :length]) for part in parts]).mean(0)  # [t, t]
    lags = [float(similarity.diagonal(lag).mean()) for lag in range(length)]

    def best(seconds: tuple[float, float]) -> float:
        first, last = round(seconds[0] * _RATE), min(round(seconds[1] * _RATE), length - round(_OVERLAP * _RATE))
        return max(lags[first : last + 1], default=math.nan)

    silent = float(mel.max() - mel.min()) < 1e-4
    return LagSimilarity(math.nan, math.nan) if silent else LagSimilarity(best(BAR), best(PHRASE))


def similarity_matrix(frames: Tensor) -> Tensor:
    """Cosine similarity of all pairs of frames after removal of the clip's mean frame: [N, T] -> [T, T]."""
    centred = F.normalize(frames - frames.mean(-1, keepdim=True), dim=0)
    return centred.T @ centred


def _longest_diagonal(flags: np.ndarray) -> int:
    """Length of the longest run of True along any diagonal of [n, n]."""
    run, longest = np.zeros(len(flags) + 1, int), 0
    for row in flags:
        run[1:] = (run[:-1] + 1) * row
        longest = max(longest, int(run.max()))
    return longest
