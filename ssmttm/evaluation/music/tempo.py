"""Tempo, beats and onsets from onset strength, without a network.

The tempo is the strongest period of the onsets' autocorrelation under a log-normal preference for 120 beats a minute;
beats are tracked by dynamic programming (Ellis, Beat Tracking by Dynamic Programming, JNMR 36, 2007).
Shapes: T frames at `features.ONSET_RATE`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ssmttm.audio.features import ONSET_RATE, autocorrelation, pick_peaks

SLOWEST, FASTEST = 40.0, 240.0  # beats a minute
_PREFERRED, _OCTAVES = 120.0, 0.9  # centre and standard deviation of the preference
_TIGHTNESS = 100.0  # cost of a deviation from the period, per squared log ratio
_MIN_GAP = 0.03  # seconds between two onsets
_PROMINENCE = 0.1  # of the strongest onset


def envelope(onsets: Tensor) -> np.ndarray:
    """Onset envelope, the smoothed sum over the bands of `features.onset_strength`: [N, T] -> [T], >= 0."""
    curve = onsets.sum(0).double().numpy()
    return np.convolve(curve, np.hanning(7) / np.hanning(7).sum(), "same")


def tempo(curve: np.ndarray) -> float:
    """Beats per minute of an onset envelope [T]; 0 without onsets. Octave errors are possible."""
    correlation = autocorrelation(torch.from_numpy(curve)).numpy()
    if correlation[0] <= 1e-9:
        return 0.0
    shortest, longest = int(60 * ONSET_RATE / FASTEST), min(int(60 * ONSET_RATE / SLOWEST), len(curve) - 2)
    lags = np.arange(shortest, longest + 1)
    bpm = 60 * ONSET_RATE / lags
    unbiased = correlation[lags] * len(curve) / (len(curve) - lags)
    score = unbiased * np.exp(-0.5 * np.square(np.log2(bpm / _PREFERRED) / _OCTAVES))
    return 60 * ONSET_RATE / float(_interpolate_peak(score, int(score.argmax()), shortest))


def beats(curve: np.ndarray, bpm: float) -> np.ndarray:
    """Beat times in seconds; empty without a tempo."""
    if bpm <= 0:
        return np.empty(0)
    period = 60 * ONSET_RATE / bpm
    strength = curve / curve.std() if curve.std() > 0 else curve
    lags = np.arange(round(2 * period), round(period / 2) - 1, -1)
    cost = -_TIGHTNESS * np.square(np.log(lags / period))
    score, previous = strength.copy(), np.full(len(curve), -1)
    half = lags[-1]
    for start in range(half, len(curve), half):  # within half a period no beat depends on another
        frames = np.arange(start, min(start + half, len(curve)))
        earlier = frames[:, None] - lags  # [t, candidates]
        candidates = np.where(earlier >= 0, score[earlier.clip(0)] + cost, -np.inf)
        best, gain = candidates.argmax(1), candidates.max(1)
        linked = gain > 0
        score[frames[linked]] += gain[linked]
        previous[frames[linked]] = earlier[linked, best[linked]]
    tail = len(curve) - max(1, round(period))
    path = [tail + int(score[tail:].argmax())]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
    return np.array(path[::-1]) / ONSET_RATE


def bar_lines(onsets: Tensor, bpm: float, beats_a_bar: int) -> np.ndarray:
    """Estimated times of the bar lines in seconds: tracked beats, those on which the bass is strongest.

    onsets [N, T]: of `features.onset_strength`, the bass first. The tempo and the beats of a bar are given.
    """
    times = beats(envelope(onsets), bpm)
    frames = np.minimum((times * ONSET_RATE).astype(int), onsets.shape[-1] - 1)
    bass = np.convolve(onsets[0].double().numpy(), np.ones(5), "same")[frames]
    phases = [bass[phase::beats_a_bar].mean() for phase in range(min(beats_a_bar, len(times)))]
    return times[int(np.argmax(phases)) :: beats_a_bar] if phases else times


def beat_variation(times: np.ndarray) -> float:
    """Coefficient of variation of the intervals between beats: 0 for a metronome; NaN with fewer than three beats."""
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 else math.nan


def onset_density(curve: np.ndarray) -> float:
    """Onsets per second (`onsets`)."""
    return len(onsets(curve)) / (len(curve) / ONSET_RATE)


def onsets(curve: np.ndarray) -> np.ndarray:
    """Onset times in seconds: peaks above a tenth of the strongest, more than 30 ms apart."""
    reach = round(_MIN_GAP * ONSET_RATE)
    peaks = pick_peaks(torch.from_numpy(curve)[None], reach, max(_PROMINENCE * curve.max(), 1e-3))[0]
    frames = np.flatnonzero(peaks.numpy())
    return (frames[np.insert(np.diff(frames) > reach, 0, True)] if len(frames) else frames) / ONSET_RATE


def _interpolate_peak(score: np.ndarray, peak: int, first: int) -> float:
    """The lag of a peak by parabolic interpolation."""
    if 0 < peak < len(score) - 1:
        left, top, right = score[peak - 1 : peak + 2]
        curvature = left - 2 * top + right
        if curvature < 0:
            return first + peak + 0.5 * (left - right) / curvature
    return float(first + peak)
