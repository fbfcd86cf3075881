"""Integrated loudness after ITU-R BS.1770-4."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ssmttm.errors import UserError

_BLOCK, _STEP = 0.4, 0.1  # seconds
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0  # LUFS; LU below the loudness above the absolute gate
_CHANNEL_WEIGHTS = np.array([1.0, 1.0, 1.0, 1.41, 1.41])  # left, right, centre, left and right surround


def integrated_loudness(wav: Tensor | np.ndarray, sample_rate: int) -> float:
    """Integrated loudness in LUFS of [C, S] or [S], C <= 5; -inf for silence.

    A clip shorter than the standard's block of 0.4 s is measured as one block.
    """
    from scipy.signal import sosfilt

    samples = np.atleast_2d(wav.detach().cpu().float().numpy() if isinstance(wav, Tensor) else wav)
    if len(samples) > len(_CHANNEL_WEIGHTS):
        raise UserError(f"loudness is defined for up to 5 channels, got {len(samples)}: mix down first")
    if samples.shape[1] == 0:
        return float("-inf")
    power = _CHANNEL_WEIGHTS[: len(samples)] @ np.square(sosfilt(_k_weighting(sample_rate), samples))  # [S]
    energy = np.concatenate([[0.0], np.cumsum(power)])
    length = min(round(_BLOCK * sample_rate), samples.shape[1])
    starts = np.round(np.arange(0, samples.shape[1] - length + 1, _STEP * sample_rate)).astype(np.int64)
    blocks = (energy[starts + length] - energy[starts]) / length
    with np.errstate(divide="ignore"):
        levels = _lufs(blocks)
        audible = levels > _ABSOLUTE_GATE
        if not audible.any():
            return float("-inf")
        gate = _lufs(blocks[audible].mean()) + _RELATIVE_GATE
    return float(_lufs(blocks[audible & (levels > gate)].mean()))


def normalise_loudness(wav: Tensor, sample_rate: int, lufs: float = -18.0) -> Tensor:
    """Scale [C, S] or [S] to a loudness in LUFS, or as near as a peak of 1 allows; silence stays silent."""
    measured = integrated_loudness(wav, sample_rate)
    if measured == float("-inf"):
        return wav
    gain = 10 ** ((lufs - measured) / 20)
    return wav * min(gain, 1 / float(torch.amax(wav.abs())))


def _lufs(energy: np.ndarray) -> np.ndarray:
    return -0.691 + 10 * np.log10(energy)


@cache
def _k_weighting(sample_rate: int) -> np.ndarray:
    """The two filters of BS.1770-4 as second-order sections [2, 6]; at 48 kHz its tables 1 and 2.

    The standard tabulates one rate. The analogue prototypes are from De Man, Evaluation of Implementations of the EBU
    R128 Loudness Measurement (AES 145, 2018).
    """
    gain, q = 10 ** (3.999843853973347 / 20), 0.7071752369554196
    w = np.tan(np.pi * min(1_681.974450955533 / sample_rate, 0.49))
    raised = gain**0.4996667741545416 * w / q
    shelf = np.array([gain + raised + w * w, 2 * (w * w - gain), gain - raised + w * w, *_denominator(w, q)])
    w, q = np.tan(np.pi * 38.13547087602444 / sample_rate), 0.5003270373238773
    denominator = np.array(_denominator(w, q))
    return np.array([shelf / shelf[3], [1.0, -2.0, 1.0, *(denominator / denominator[0])]])


def _denominator(w: float, q: float) -> tuple[float, float, float]:
    """The denominator of a second-order filter of quality `q` with the prewarped corner `w`."""
    return 1 + w / q + w * w, 2 * (w * w - 1), 1 - w / q + w * w
