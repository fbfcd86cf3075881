"""Self-repetition: windows of a spectrogram that are similar to an earlier one. Shapes: T frames, M mels."""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ssmttm.audio.features import MEL_RATE

_RATE = 10  # frames per second of the comparison
_REPEAT = 0.95  # correlation above which a window repeats another


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


def _longest_diagonal(flags: np.ndarray) -> int:
    """Length of the longest run of True along any diagonal of [n, n]."""
    run, longest = np.zeros(len(flags) + 1, int), 0
    for row in flags:
        run[1:] = (run[:-1] + 1) * row
        longest = max(longest, int(run.max()))
    return longest
