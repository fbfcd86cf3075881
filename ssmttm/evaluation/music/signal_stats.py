"""Signal statistics: true peak, clipping, silence, clicks, stereo width, brightness.

Pure functions of audio [C, S], float in [-1, 1].
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.audio.defects import SILENCE_RMS
from ssmttm.evaluation.music.audio_checks import CLIPPED_LEVEL

_FRAME = 0.05  # seconds of a frame in `silent_fraction`
_CLICK_WINDOW, _CLICK_GAP = 0.01, 0.0005  # seconds to each side of a sample; nearest ones that do not count
_CLICK_RATIO, _CLICK_LEVEL = 12.0, 1e-3  # above the local level; of full scale
_FFT = 4096
_FLOOR = 1e-6  # bandwidth ends where the power is 60 dB below the maximum
_ROLLOFF = 0.95
_PHASES, _TAPS = 4, 24  # of the interpolation filter; taps per phase
_BLOCK = 16  # samples interpolated at once


def true_peak(wav: Tensor) -> float:
    """True peak in dBTP by oversampling 4 times (ITU-R BS.1770-4, annex 2); -inf for silence.

    Interpolates only blocks with samples high enough that the filter's gain could exceed the highest sample.
    """
    padded = F.pad(wav, (_TAPS // 2, -wav.shape[-1] % _BLOCK + _TAPS // 2))
    blocks = padded.unfold(-1, _BLOCK + _TAPS - 1, _BLOCK)  # [C, n, block + taps - 1]
    peaks = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
    highest, filters = peaks.max(), _interpolator()
    interpolated = blocks[peaks * filters.abs().sum(0).max() >= highest] @ filters  # [loud, block * 4]
    return float(20 * torch.maximum(interpolated.abs().max(), highest).log10())


def clipped_fraction(wav: Tensor) -> float:
    """Fraction of the samples at full scale."""
    return float((wav.abs() >= CLIPPED_LEVEL).float().mean())


def silent_fraction(wav: Tensor, sample_rate: int) -> float:
    """Fraction of frames of 50 ms below -60 dBFS in all channels."""
    size = max(1, round(_FRAME * sample_rate))
    frames = F.pad(wav, (0, -wav.shape[-1] % size)).unfold(-1, size, size)  # [C, T, size]
    return float((frames.square().mean(-1).amax(0).sqrt() < SILENCE_RMS).float().mean())


def clicks(wav: Tensor, sample_rate: int) -> float:
    """Clicks per second: samples or steps that stand out of the 10 ms around them, in the mono mix.

    The second difference there is more than 12 times its local root mean square without the nearest half millisecond
    (in Gaussian noise one of 1e30 is). The attack of a note is loud for longer than that and is none. [C, S].
    """
    bend = F.pad(wav.mean(0).diff(n=2), (1, 1))  # [S]
    reach, near = round(_CLICK_WINDOW * sample_rate), round(_CLICK_GAP * sample_rate)
    total = F.pad(bend.double().square(), (reach + 1, reach)).cumsum(0)  # energy before each sample, shifted by reach

    def energy(half: int) -> Tensor:
        centre = torch.arange(reach + 1, reach + 1 + len(bend))
        return total[centre + half] - total[centre - half - 1]

    local = ((energy(reach) - energy(near)).clamp_min(0) / (2 * (reach - near))).sqrt()
    found = (bend.abs() > _CLICK_RATIO * local) & (bend.abs() > _CLICK_LEVEL)
    positions = found.nonzero()[:, 0]
    separate = int((positions.diff() > reach).sum()) + 1 if len(positions) else 0
    return separate / (wav.shape[-1] / sample_rate)


def dc_offset(wav: Tensor) -> float:
    """Largest absolute mean of a channel."""
    return float(wav.mean(-1).abs().max())


def stereo(wav: Tensor) -> tuple[float, float] | None:
    """Width, the side's fraction of the energy (0: identical channels; 0.5: unrelated ones), and channel correlation.

    None unless there are two channels; correlation 0 if one of them is silent.
    """
    if len(wav) != 2:
        return None
    left, right = wav - wav.mean(-1, keepdim=True)
    mid, side = (left + right).square().sum(), (left - right).square().sum()
    energy = (left.square().sum() * right.square().sum()).sqrt()
    correlation = float((left * right).sum() / energy) if energy > 0 else 0.0
    return float(side / (mid + side).clamp_min(1e-12)), correlation


def spectrum(wav: Tensor) -> Tensor:
    """Power spectrum averaged over time and channels, [_FFT / 2 + 1]."""
    size = min(_FFT, wav.shape[-1])
    window = torch.hann_window(_FFT)
    frames = F.pad(wav, (0, max(0, _FFT - size))).unfold(-1, _FFT, _FFT)  # [C, T, _FFT]
    return torch.view_as_real(torch.fft.rfft(frames * window)).square().mean((0, 1)).sum(-1)


def brightness(power: Tensor, sample_rate: int) -> tuple[float, float, float]:
    """Centroid, roll-off (95 % of the power is below) and bandwidth (no higher frequency is within 60 dB), in Hz.

    power: from `spectrum`. All 0 for silence.
    """
    hertz = torch.linspace(0, sample_rate / 2, len(power))
    total = power.sum()
    if total <= 1e-12:
        return 0.0, 0.0, 0.0
    rolloff = hertz[int((power.cumsum(0) >= _ROLLOFF * total).nonzero()[0])]
    bandwidth = hertz[int((power >= _FLOOR * power.max()).nonzero()[-1])]
    magnitude = power.sqrt()
    return float((hertz * magnitude).sum() / magnitude.sum()), float(rolloff), float(bandwidth)


@lru_cache(maxsize=1)
def _interpolator() -> Tensor:
    """A Kaiser-windowed sinc in 4 phases, each of unit gain at 0 Hz, for each sample of a block.

    A matrix from a block's samples and their neighbours to the interpolated values: [block + taps - 1, block * 4].
    """
    taps = torch.arange(_TAPS) - _TAPS // 2 + 1  # correlation: tap k meets sample s + k - taps / 2
    positions = taps[None] - torch.arange(_PHASES)[:, None] / _PHASES
    relative = (positions / (_TAPS / 2)).clamp(-1, 1)
    window = torch.special.i0(8.0 * (1 - relative.square()).sqrt()) / torch.special.i0(torch.tensor(8.0))
    filters = torch.sinc(positions) * window
    filters = F.pad(filters / filters.sum(1, keepdim=True), (0, _BLOCK - 1))
    return torch.cat([filters.roll(i, 1) for i in range(_BLOCK)]).T.contiguous()
