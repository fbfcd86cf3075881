"""Two channels: their width, correlation and balance, and a mix to one that does not cancel.

Shapes: C channels, S samples; float32.
"""

from typing import NamedTuple

import numpy as np

from ssmttm.errors import UserError

DUAL_MONO = 1e-5  # energy of side over mid: below it the channels are the same
CANCEL = 0.2  # energy of mid over side: below it the channels cancel when mixed down
MAX_BALANCE = 60.0  # dB
STEREO = 2


class StereoStatistics(NamedTuple):
    """Statistics of two channels.

    Attributes:
        width: the side's fraction of the energy: 0 for equal channels, 0.5 for unrelated ones or one silent channel, 1
            for channels that cancel; 0 for silence.
        correlation: of the channels, in [-1, 1]; 0 if one is silent.
        balance: level of the left channel over the right one in dB, at most 60 either way; 0 for silence.
    """

    width: float
    correlation: float
    balance: float

    @property
    def is_dual_mono(self) -> bool:
        """Whether both channels are the same (side 50 dB below mid)."""
        return is_dual_mono(self.width)


def is_dual_mono(width: float) -> bool:
    """Whether channels of this width are the same."""
    return width <= DUAL_MONO / (1 + DUAL_MONO)


def stereo_statistics(channels: np.ndarray) -> StereoStatistics:
    """Statistics of [2, S]. Raises ValueError for another number of channels."""
    if len(channels) != STEREO:
        raise ValueError(f"stereo statistics are of two channels, got {len(channels)}")
    left, right = channels
    energy_left, energy_right = float(left @ left), float(right @ right)
    product, total = float(left @ right), energy_left + energy_right
    if total == 0:
        return StereoStatistics(0.0, 0.0, 0.0)
    difference = left - right  # not from the sums: rounding would hide a side 50 dB below
    width = min(1.0, float(difference @ difference) / (2 * total))
    norm = (energy_left * energy_right) ** 0.5
    correlation = min(1.0, max(-1.0, product / norm)) if norm > 0 else 0.0
    floor = total * 10 ** (-MAX_BALANCE / 10)
    balance = 10 * np.log10(max(energy_left, floor) / max(energy_right, floor))
    return StereoStatistics(width, correlation, float(min(MAX_BALANCE, max(-MAX_BALANCE, balance))))


def mix_down(channels: np.ndarray) -> np.ndarray:
    """The mean of the channels [C, S] -> [S], or the left one where two channels cancel."""
    mono: np.ndarray = channels.mean(axis=0)
    if len(channels) == STEREO:
        side = (channels[0] - channels[1]) / 2
        if mono @ mono < CANCEL * (side @ side):
            return channels[0]
    return mono


def with_channels(channels: np.ndarray, n: int, name: str) -> np.ndarray:
    """Audio [C, S] on n = 1 or 2 channels: one channel is doubled, two are mixed to their mean.

    Raises:
        UserError: more than two channels, of which no two can be chosen; `name` says whose.
    """
    if len(channels) == n:
        return channels
    if n == 1:
        return channels.mean(axis=0, keepdims=True)
    if len(channels) > STEREO:
        raise UserError(f"{name} has {len(channels)} channels: mix it down to two")
    return np.repeat(channels, n, axis=0)
