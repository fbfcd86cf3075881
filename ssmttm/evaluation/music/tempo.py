"""Tempo, beats and onsets from onset strength, without a network.

The tempo is the strongest period of the onsets' autocorrelation under a log-normal preference for 120 beats a minute;
beats follow it by dynamic programming (Ellis, Beat Tracking by Dynamic Programming, JNMR 36, 2007).
Shapes: T frames at `features.ONSET_RATE`.
"""

import math

import numpy as np
from torch import Tensor

from ssmttm.audio.features import ONSET_RATE

SLOWEST, FASTEST = 40.0, 240.0  # beats a minute
_PREFERRED, _OCTAVES = 120.0, 0.9  # centre and standard deviation of the preference
_TIGHTNESS = 100.0  # cost of a beat that strays from the period, per squared log ratio
_APART = 0.03  # seconds within which only one onset counts
_PROMINENCE = 0.1  # of the strongest onset


def envelope(onsets: Tensor) -> np.ndarray:
    """One onset curve from the bands of `features.onset_strength`: [N, T] -> [T], lightly smoothed, >= 0."""
    curve = onsets.sum(0).double().numpy()
    return np.convolve(curve, np.hanning(7) / np.hanning(7).sum(), "same")


def tempo(curve: np.ndarray) -> float:
    """Beats a minute of an onset curve [T]; 0 where there is no onset. An octave's error is in its nature."""
    centred = curve - curve.mean()
    spectrum = np.fft.rfft(centred, 2 * len(curve))
    correlation = np.fft.irfft(np.square(np.abs(spectrum)))[: len(curve)]
    if correlation[0] <= 1e-9:
        return 0.0
    shortest, longest = int(60 * ONSET_RATE / FASTEST), min(int(60 * ONSET_RATE / SLOWEST), len(curve) - 2)
    lags = np.arange(shortest, longest + 1)
    bpm = 60 * ONSET_RATE / lags
    unbiased = correlation[lags] * len(curve) / (len(curve) - lags)
    score = unbiased * np.exp(-0.5 * np.square(np.log2(bpm / _PREFERRED) / _OCTAVES))
    return 60 * ONSET_RATE / float(_refined(score, int(score.argmax()), shortest))


def beats(curve: np.ndarray, bpm: float) -> np.ndarray:
    """Times of the beats in seconds; empty without a tempo."""
    if bpm <= 0:
        return np.empty(0)
    period = 60 * ONSET_RATE / bpm
    strength = curve / curve.std() if curve.std() > 0 else curve
    back = np.arange(-round(2 * period), -round(period / 2) + 1)
    cost = -_TIGHTNESS * np.square(np.log(-back / period))
    score, before = strength.copy(), np.full(len(curve), -1)
    for start in range(-back[-1], len(curve), -back[-1]):  # within half a period no beat depends on another
        places = np.arange(start, min(start - back[-1], len(curve)))
        earlier = places[:, None] + back  # [t, candidates]
        reached = np.where(earlier >= 0, score[earlier.clip(0)] + cost, -np.inf)
        best = reached.argmax(1)
        gain = reached.max(1)
        found = gain > 0
        score[places[found]] += gain[found]
        before[places[found]] = earlier[found, best[found]]
    tail = len(curve) - max(1, round(period))
    frames = [tail + int(score[tail:].argmax())]
    while before[frames[-1]] >= 0:
        frames.append(int(before[frames[-1]]))
    return np.array(frames[::-1]) / ONSET_RATE


def beat_variation(times: np.ndarray) -> float:
    """Coefficient of variation of the time between beats: 0 is a metronome; NaN with fewer than three beats."""
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 else math.nan


def onset_density(curve: np.ndarray) -> float:
    """Onsets a second: peaks of the curve that rise above a tenth of the strongest, 30 ms apart."""
    reach = round(_APART * ONSET_RATE)
    padded = np.pad(curve, reach)
    highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).max(1)
    peaks = (curve == highest) & (curve > _PROMINENCE * curve.max()) & (curve > 1e-3)
    rises = np.flatnonzero(peaks)
    apart = rises[np.insert(np.diff(rises) > reach, 0, True)] if len(rises) else rises
    return len(apart) / (len(curve) / ONSET_RATE)


def _refined(score: np.ndarray, peak: int, first: int) -> float:
    """The lag of a peak, between its neighbours by a parabola."""
    if 0 < peak < len(score) - 1:
        left, top, right = score[peak - 1 : peak + 2]
        curvature = left - 2 * top + right
        if curvature < 0:
            return first + peak + 0.5 * (left - right) / curvature
    return float(first + peak)
