"""Audio quality of a segment: silence, clipping, stereo defects, bandwidth, loudness.

Shapes: C channels, S samples at the file's own rate; float32 with full scale 1.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.track import Rejected
from ssmttm.audio.loudness import integrated_loudness
from ssmttm.audio.stereo import CANCEL, DUAL_MONO

Stereo = Literal["mono", "dual-mono", "stereo", "out-of-phase", "dead channel"]

_SILENCE = (0.05, 10 ** (-60 / 10))  # frame in seconds, mean square
_FULL_SCALE = 0.9995  # runs of samples above it are clipped
_FLAT = 2**-15  # of the peak: tolerance within a clipped run
_RUN = 3  # length of the shortest clipped run
_DEAD = 1e-6  # energy of the weakest over the strongest channel
_FRAME = 0.2  # seconds per averaged spectrum
_CHUNK = 32  # spectra computed at once
_GROUP = 100.0  # Hz, smoothing of the average spectrum
_FLOOR = 1e-8  # energy relative to the strongest group: 80 dB


@dataclass(frozen=True)
class Quality:
    """Quality measurements of a segment.

    `dual-mono` channels are identical (side 50 dB below mid), `out-of-phase` channels cancel in the mono mix (mid 7 dB
    below side), and a `dead channel` is silent beside another.
    """

    silence: float  # fraction of 50 ms frames that are below -60 dBFS in all channels
    clipped: float  # fraction of samples in runs of three or more at full scale, or at the channel's flat maximum
    stereo: Stereo
    bandwidth: float  # Hz, the highest frequency at which the average spectrum is within 80 dB of its peak
    loudness: float  # LUFS of the mono mix, or of the channels; -inf for silence


@dataclass(frozen=True)
class Filters:
    """Quality filters. The defaults reject defects only."""

    max_silence: float = 0.5
    max_clipped: float = 0.02
    min_bandwidth: float = 4_500.0  # Hz; the default rejects audio that was once sampled at 8 kHz
    dual_mono: bool = True  # whether to accept such channels
    out_of_phase: bool = False  # the same; for audio that stays stereo


def measure(channels: np.ndarray, rate: int, mixed: bool = True) -> Quality:
    """Measure a segment, float32 [C, S], C and S at least 1, finite, at `rate` Hz.

    Bandwidth and loudness are those of the mono mix if `mixed`, else those of the channels together.
    """
    mono = channels.mean(axis=0)
    measured = mono[None] if mixed else channels
    return Quality(
        silence=_silence(channels, rate),
        clipped=float(np.mean([_clipped(channel) for channel in channels])),
        stereo=_stereo(channels, mono),
        bandwidth=_bandwidth(measured, rate),
        loudness=integrated_loudness(measured, rate),
    )


def check_quality(quality: Quality, filters: Filters) -> Rejected | None:
    """Why the filters reject a segment; None if they accept it."""
    silence = f"{quality.silence:.0%}".replace("%", " %")
    if quality.stereo == "out-of-phase" and not filters.out_of_phase:
        return Rejected("phase", "its channels cancel each other when mixed down to mono: invert one of them")
    if quality.loudness == float("-inf"):
        return Rejected("silent", "it is silent throughout")
    if quality.silence > filters.max_silence:
        return Rejected("silent", f"it is silent for {silence} of its length")
    if quality.clipped > filters.max_clipped:
        return Rejected("clipped", f"it is clipped for {100 * quality.clipped:.1f} % of its samples")
    if quality.bandwidth < filters.min_bandwidth:
        return Rejected("bandwidth", f"it holds nothing above {quality.bandwidth:.0f} Hz")
    if quality.stereo == "dual-mono" and not filters.dual_mono:
        return Rejected("dual-mono", "its channels are the same")
    return None


def _bandwidth(measured: np.ndarray, rate: int) -> float:
    """Highest frequency in Hz at which the average spectrum of [C, S] is above the floor; 0 for silence."""
    from scipy.fft import rfft

    n_samples = measured.shape[1]
    length = min(2 * max(1, round(_FRAME * rate / 2)), n_samples)
    frames = measured[:, : n_samples // length * length].reshape(-1, length)
    frames = frames * np.hanning(length + 2)[1:-1].astype(np.float32)
    power = np.zeros(length // 2 + 1)
    for first in range(0, len(frames), _CHUNK):
        spectrum = rfft(frames[first : first + _CHUNK], axis=1)
        power += (np.square(spectrum.real) + np.square(spectrum.imag)).sum(axis=0)
    group = max(1, min(round(_GROUP * length / rate), len(power)))
    groups = power[: len(power) // group * group].reshape(-1, group).mean(axis=1)
    above = np.flatnonzero(groups > _FLOOR * groups.max())
    return min(float((above[-1] + 1) * group * rate / length), rate / 2) if len(above) else 0.0


def _silence(channels: np.ndarray, rate: int) -> float:
    length = min(max(1, round(_SILENCE[0] * rate)), channels.shape[1])
    frames = channels[:, : channels.shape[1] // length * length].reshape(len(channels), -1, length)
    loudest = np.einsum("cns,cns->cn", frames, frames).max(axis=0) / length
    return float(np.mean(loudest < _SILENCE[1]))


def _clipped(channel: np.ndarray) -> float:
    """Fraction of samples in runs at the maximum or minimum."""
    high, low = float(channel.max()), float(channel.min())
    signs = [(channel, high), (-channel, -low)]
    return sum(_in_runs(samples, peak) for samples, peak in signs if peak > 0) / len(channel)


def _in_runs(channel: np.ndarray, peak: float) -> int:
    """Number of samples of [S] in runs at its peak."""
    positions = np.flatnonzero(channel >= min(_FULL_SCALE, peak * (1 - _FLAT)))
    if len(positions) < _RUN:
        return 0
    starts = np.flatnonzero(np.diff(positions, prepend=-2) > 1)
    runs = np.diff(starts, append=len(positions))
    return int(runs[runs >= _RUN].sum())


def _stereo(channels: np.ndarray, mono: np.ndarray) -> Stereo:
    if len(channels) == 1:
        return "mono"
    each = np.einsum("cs,cs->c", channels, channels)
    mid = float(mono @ mono)
    side = float(each.mean()) - mid
    if side <= DUAL_MONO * mid:
        return "dual-mono"
    if mid < CANCEL * side:
        return "out-of-phase"
    return "dead channel" if each.min() <= _DEAD * each.max() else "stereo"
