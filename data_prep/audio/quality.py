"""What is wrong with a segment's sound, if anything: silence, clipping, channels that cancel, no treble; and its level.

Shapes: C channels, S samples at the file's own rate; float32 with full scale 1.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from data_prep.track import Rejected

Stereo = Literal["mono", "dual-mono", "stereo", "out-of-phase", "dead channel"]

_SILENCE = (0.05, 10 ** (-60 / 10))  # frame in seconds, mean square
_FULL_SCALE = 0.9995  # of 1; a run of samples there is clipped, whatever its shape
_FLAT = 2**-15  # of the peak: how level a ceiling is
_RUN = 3  # samples of the shortest clipped run
_DUAL_MONO = 1e-5  # side against mid, in energy
_CANCEL = 0.2  # mid against side, in energy
_DEAD = 1e-6  # the weakest channel against the strongest, in energy
_FRAME = 0.2  # seconds, of the spectra that are averaged
_CHUNK = 32  # of them that are made at a time
_GROUP = 100.0  # Hz that the average spectrum is averaged over again
_FLOOR = 1e-8  # of the strongest group, in energy: 80 dB
_BLOCK, _STEP = 0.4, 0.1  # seconds: of BS.1770-4
_GATES = (-70.0, -10.0)  # LUFS; LU below the loudness above the first gate


@dataclass(frozen=True)
class Quality:
    """What was measured in a segment.

    Attributes:
        silence: share of 50 ms frames of which every channel is below -60 dBFS.
        clipped: share of samples that stand in runs of three or more at full scale, or at the channel's flat ceiling.
            The flat tops of a lone square wave count too.
        stereo: `mono` is one channel, `dual-mono` several that are the same (side 50 dB below mid), `out-of-phase`
            such that cancel in the mono mix (mid 7 dB below side), `dead channel` one that is silent against another.
        bandwidth: Hz, up to where the average spectrum is within 80 dB of its peak.
        loudness: LUFS of the mono mix, -inf for silence.
    """

    silence: float
    clipped: float
    stereo: Stereo
    bandwidth: float
    loudness: float


@dataclass(frozen=True)
class Filters:
    """What a segment must be like. The defaults refuse defects and no music that was meant so.

    Attributes:
        max_silence, max_clipped: shares.
        min_bandwidth: Hz; the default tells what was once sampled at 8 kHz.
        dual_mono, out_of_phase: whether such channels are let in. Mixed down, the first lose nothing.
    """

    max_silence: float = 0.5
    max_clipped: float = 0.02
    min_bandwidth: float = 4_500.0
    dual_mono: bool = True
    out_of_phase: bool = False


def measure(channels: np.ndarray, rate: int) -> Quality:
    """Measure a segment, float32 [C, S], C and S at least 1, finite, at `rate` Hz."""
    mono = channels.mean(axis=0)
    return Quality(
        silence=_silence(channels, rate),
        clipped=float(np.mean([_clipped(channel) for channel in channels])),
        stereo=_stereo(channels, mono),
        bandwidth=_bandwidth(mono, rate),
        loudness=loudness(mono, rate),
    )


def judge(quality: Quality, filters: Filters) -> Rejected | None:
    """Why the filters refuse a segment; None if they do not."""
    share = f"{quality.silence:.0%}".replace("%", " %")
    if quality.stereo == "out-of-phase" and not filters.out_of_phase:
        return Rejected("phase", "its channels cancel each other when mixed down to mono: invert one of them")
    if quality.loudness == float("-inf"):
        return Rejected("silent", "it is silent throughout")
    if quality.silence > filters.max_silence:
        return Rejected("silent", f"it is silent for {share} of its length")
    if quality.clipped > filters.max_clipped:
        return Rejected("clipped", f"it is clipped for {100 * quality.clipped:.1f} % of its samples")
    if quality.bandwidth < filters.min_bandwidth:
        return Rejected("bandwidth", f"it holds nothing above {quality.bandwidth:.0f} Hz")
    if quality.stereo == "dual-mono" and not filters.dual_mono:
        return Rejected("dual-mono", "its channels are the same")
    return None


def loudness(mono: np.ndarray, rate: int) -> float:
    """Integrated loudness of float32 [S] in LUFS (ITU-R BS.1770-4), -inf for silence.

    Equal to `ssmttm.audio.loudness`, some ten times as fast. A sound under the standard's 0.4 s is one block.
    """
    from scipy.signal import sosfilt

    energy = np.concatenate([[0.0], np.cumsum(np.square(sosfilt(_k_weighting(rate), mono)))])
    length = min(round(_BLOCK * rate), len(mono))
    starts = np.round(np.arange(0, len(mono) - length + 1, _STEP * rate)).astype(np.int64)
    blocks = (energy[starts + length] - energy[starts]) / length
    with np.errstate(divide="ignore"):
        levels = _lufs(blocks)
        heard = levels > _GATES[0]
        if not heard.any():
            return float("-inf")
        gate = _lufs(blocks[heard].mean()) + _GATES[1]
    return float(_lufs(blocks[heard & (levels > gate)].mean()))


def _lufs(energy: np.ndarray) -> np.ndarray:
    return -0.691 + 10 * np.log10(energy)


@cache
def _k_weighting(rate: int) -> np.ndarray:
    """The two filters of BS.1770-4 as second-order sections [2, 6]; at 48 kHz its tables 1 and 2.

    The standard tables one rate; the analogue filters behind it are from De Man, Evaluation of Implementations of the
    EBU R128 Loudness Measurement (AES 145, 2018).
    """
    gain, q = 10 ** (3.999843853973347 / 20), 0.7071752369554196
    w = np.tan(np.pi * min(1_681.974450955533 / rate, 0.49))
    raised = gain**0.4996667741545416 * w / q
    shelf = np.array([gain + raised + w * w, 2 * (w * w - gain), gain - raised + w * w, *_poles(w, q)])
    w, q = np.tan(np.pi * 38.13547087602444 / rate), 0.5003270373238773
    poles = _poles(w, q)
    return np.array([shelf / shelf[3], [1.0, -2.0, 1.0, *(np.array(poles) / poles[0])]])


def _poles(w: float, q: float) -> tuple[float, float, float]:
    """The denominator of a second-order filter of quality `q` whose corner was warped to `w`."""
    return 1 + w / q + w * w, 2 * (w * w - 1), 1 - w / q + w * w


def _bandwidth(mono: np.ndarray, rate: int) -> float:
    """Hz up to where the average spectrum is above the floor; 0 for silence."""
    from scipy.fft import rfft

    length = min(2 * max(1, round(_FRAME * rate / 2)), len(mono))
    frames = mono[: len(mono) // length * length].reshape(-1, length) * np.hanning(length + 2)[1:-1].astype(np.float32)
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
    """The share of samples in runs at either ceiling."""
    high, low = float(channel.max()), float(channel.min())
    ceilings = [(channel, high), (-channel, -low)]
    return sum(_in_runs(side, peak) for side, peak in ceilings if peak > 0) / len(channel)


def _in_runs(channel: np.ndarray, peak: float) -> int:
    """How many samples of [S] stand in runs at its peak."""
    at = np.flatnonzero(channel >= min(_FULL_SCALE, peak * (1 - _FLAT)))
    if len(at) < _RUN:
        return 0
    starts = np.flatnonzero(np.diff(at, prepend=-2) > 1)
    runs = np.diff(starts, append=len(at))
    return int(runs[runs >= _RUN].sum())


def _stereo(channels: np.ndarray, mono: np.ndarray) -> Stereo:
    if len(channels) == 1:
        return "mono"
    each = np.einsum("cs,cs->c", channels, channels)
    mid = float(mono @ mono)
    side = float(each.mean()) - mid
    if side <= _DUAL_MONO * mid:
        return "dual-mono"
    if mid < _CANCEL * side:
        return "out-of-phase"
    return "dead channel" if each.min() <= _DEAD * each.max() else "stereo"
