"""Reverb: impulse responses of rooms from a feedback delay network, laid over audio by convolution.

The network has four delay lines, mixed by a Hadamard matrix, each with a low-pass in its loop (Jot and Chaigne 1991).
Nothing is random, so the same room gives the same samples.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.signal import lfilter, oaconvolve

_HADAMARD = 0.5 * np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float64)
_SPREAD = (1.0, 1.17, 1.39, 1.61)  # lengths of the delay lines against the shortest
_LOWEST = 80.0  # Hz: below it the room is silent, so that basses stay clear


@dataclass(frozen=True, slots=True)
class Shape:
    """A room: seconds of decay (60 dB), size and distance of the first reflection in seconds, damping 0 to 1."""

    decay: float
    size: float
    before: float
    damping: float


ROOMS: dict[str, Shape] = {
    "studio": Shape(0.5, 0.019, 0.004, 0.45), "club": Shape(0.7, 0.025, 0.008, 0.5),
    "chamber": Shape(1.0, 0.029, 0.012, 0.4), "plate": Shape(1.3, 0.017, 0.002, 0.25),
    "hall": Shape(1.8, 0.041, 0.02, 0.4), "cathedral": Shape(2.6, 0.053, 0.03, 0.45),
}


def _diffuse(signal: np.ndarray, sample_rate: int) -> np.ndarray:
    """Two all-pass filters in a row (Schroeder), which make the echoes denser."""
    for seconds in (0.0051, 0.0017):
        delay = round(seconds * sample_rate)
        b, a = np.zeros(delay + 1), np.zeros(delay + 1)
        b[0], b[-1], a[0], a[-1] = -0.6, 1.0, 1.0, -0.6
        signal = lfilter(b, a, signal)
    return signal


@cache
def impulse_response(room: str, sample_rate: int, right: bool = False) -> np.ndarray:
    """The room's impulse response without the direct sound: float32 [decay * sample_rate], of unit energy. That of the
    right channel sums the delay lines with other signs, so that it is unrelated to the other one."""
    shape = ROOMS[room]
    delays = [round(shape.size * factor * sample_rate) for factor in _SPREAD]
    length = round(shape.decay * sample_rate)
    gains = np.array([10 ** (-3 * delay / length) for delay in delays])
    lines = np.zeros((4, length + max(delays)))  # what enters each line, shifted by its delay
    for line, delay in zip(lines, delays, strict=True):
        line[delay] = 1.0
    block, damping = min(delays), shape.damping
    state, signs = np.zeros((4, 1)), (1, 1, -1, -1) if right else (1, -1, 1, -1)
    output = np.zeros(length)
    for start in range(0, length, block):
        stop = min(start + block, length)
        damped, state = lfilter([1 - damping], [1, -damping], lines[:, start:stop], axis=1, zi=state)
        output[start:stop] = sum(sign * line for sign, line in zip(signs, damped, strict=True))
        mixed = _HADAMARD @ (damped * gains[:, None])
        for line, delay, entering in zip(lines, delays, mixed, strict=True):
            line[start + delay : stop + delay] += entering
    pole = 1 - 2 * np.pi * _LOWEST / sample_rate
    response = lfilter([1, -1], [1, -pole], _diffuse(output, sample_rate))
    response = np.concatenate([np.zeros(round(shape.before * sample_rate)), response])[:length]
    response *= np.linspace(1, 0, length) ** 0.25  # no step at the end
    return (response / np.sqrt(np.sum(response**2))).astype(np.float32)


def reverberate(audio: np.ndarray, room: str, sample_rate: int, right: bool = False) -> np.ndarray:
    """The reverberation alone of audio [S], as long as it."""
    return oaconvolve(audio, impulse_response(room, sample_rate, right))[: len(audio)].astype(np.float32)
