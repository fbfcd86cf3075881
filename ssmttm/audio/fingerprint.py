"""Fingerprints of sound: ten 32-bit words a second that survive encoding, gain, trimming and resampling.

A bit says whether the difference between two neighbouring frequency bands rises (Haitsma and Kalker, A Highly Robust
Audio Fingerprinting System, ISMIR 2002), here of magnitudes, over frames of 0.74 s and a lag of 0.4 s, so that words
that were begun up to half a hop apart still agree. A word of 0 stands for a frame that tells nothing: silence, or a
sound that does not change. `benchmarks/duplicates.py` measures what the choices are worth. A change of pitch or speed
is not followed.

Shapes: T words, M frames, S samples.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

RATE = 10  # words a second
BITS = 32
_LOW, _HIGH = 300.0, 3_000.0  # Hz, that the bits are about
_FRAME = 0.74  # seconds
_LAG = 4  # frames from a frame to the earlier one that it is compared with
_SPAN = 50  # frames that are heard at a time: a whole number of samples at any rate
_INNER = 8_000  # Hz, the lowest rate that sound is brought down to
_TAPS = 16  # times the factor by which the rate comes down: the taps of the low-pass filter
_SILENT = 10 ** (-72 / 20)  # root mean square, full scale is 1
_STEADY = 0.01  # change of the spectrum, as a share of it


class Alignment(NamedTuple):
    """How two fingerprints lie best upon each other.

    Attributes:
        offset: words of the first before the second begins; negative where the second begins first.
        rate: share of differing bits: 0 a copy, about 0.5 unrelated.
        overlap: words that were compared: both there, both telling.
    """

    offset: int
    rate: float
    overlap: int


NONE = Alignment(0, 1.0, 0)


class Fingerprinter:
    """Makes the fingerprint of a sound that comes in blocks; how it is cut into blocks changes nothing."""

    def __init__(self, rate: int) -> None:
        """`rate` in Hz, of the samples that will come."""
        self.rate = rate
        self._held: list[np.ndarray] = []
        self._count = 0  # samples held
        self._before = np.empty((0, BITS + 1), np.float32)  # magnitudes of the last _LAG frames
        self._words: list[np.ndarray] = []

    def add(self, mono: np.ndarray) -> None:
        """Take the next samples, float32 [s], finite."""
        self._held.append(np.array(mono, np.float32))
        self._count += len(mono)
        if self._count < self._needed:
            return
        samples = np.concatenate(self._held)
        while len(samples) >= self._needed:
            self._hear(samples[: self._needed], _SPAN)
            samples = samples[self._begins[_SPAN] :]
        self._held, self._count = [samples], len(samples)

    def finish(self) -> np.ndarray:
        """The fingerprint, uint32 [T]; empty for less than 1.2 s of sound."""
        padding = np.zeros(self._needed - self._count, np.float32)
        frames = int(np.sum(self._begins[:_SPAN] + self._length <= self._count))
        self._hear(np.concatenate([*self._held, padding]), frames)
        return np.concatenate([np.empty(0, np.uint32), *self._words])

    @cached_property
    def _begins(self) -> np.ndarray:
        """The sample at which each frame of a span begins, and the next span. int64 [_SPAN + 1]"""
        return np.round(np.arange(_SPAN + 1) * self.rate / RATE).astype(np.int64)

    @cached_property
    def _length(self) -> int:
        return round(_FRAME * self.rate)

    @cached_property
    def _needed(self) -> int:
        return int(self._begins[_SPAN - 1]) + self._length

    @cached_property
    def _factor(self) -> int:
        return max(1, self.rate // _INNER)

    @cached_property
    def _filter(self) -> np.ndarray:
        """A low-pass filter at half the inner rate, one row for each _factor of its taps. float32 [_TAPS, _factor]"""
        from scipy.signal import firwin

        taps = firwin(self._factor * _TAPS, (_HIGH + 1_000) / (self.rate / 2), window=("kaiser", 5.6))
        return taps.reshape(_TAPS, self._factor).astype(np.float32)

    @cached_property
    def _window(self) -> np.ndarray:
        """Such that the squared magnitudes of a frame add up to its mean square."""
        from scipy.fft import next_fast_len

        length = self._length // self._factor - _TAPS
        window = np.hanning(length)
        return (window * np.sqrt(2 / (next_fast_len(length, True) * np.square(window).sum()))).astype(np.float32)

    @cached_property
    def _edges(self) -> np.ndarray:
        """The first bin of each band, and of what follows them. int64 [BITS + 2]"""
        from scipy.fft import next_fast_len

        size = next_fast_len(len(self._window), True)
        hertz = np.geomspace(_LOW, _HIGH, BITS + 2)
        return np.minimum(np.round(hertz * size * self._factor / self.rate), size // 2).astype(np.int64)

    def _hear(self, samples: np.ndarray, frames: int) -> None:
        magnitudes = np.concatenate([self._before, self._magnitudes(samples)[:frames]])
        self._words.append(_words(magnitudes))
        self._before = magnitudes[-_LAG:]

    def _magnitudes(self, samples: np.ndarray) -> np.ndarray:
        """Of each band of a span's frames, float32 [_SPAN, BITS + 1]."""
        from scipy.fft import next_fast_len, rfft

        inner = self._brought_down(samples)
        cut = np.lib.stride_tricks.sliding_window_view(inner, len(self._window))
        frames = cut[self._begins[:_SPAN] // self._factor] * self._window
        spectrum = rfft(frames, next_fast_len(len(self._window), True), axis=1)[:, : self._edges[-1] + 1]
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        return np.sqrt(np.add.reduceat(power, self._edges, axis=1)[:, :-1])

    def _brought_down(self, samples: np.ndarray) -> np.ndarray:
        """Every _factor-th of the samples, low-passed."""
        if self._factor == 1:
            return samples
        whole = len(samples) // self._factor
        parts = self._filter @ samples[: whole * self._factor].reshape(whole, self._factor).T  # [_TAPS, whole]
        made = np.zeros(whole - _TAPS + 1, np.float32)
        for tap, part in enumerate(parts):
            made += part[tap : tap + len(made)]
        return made


def fingerprint(mono: np.ndarray, rate: int) -> np.ndarray:
    """The fingerprint of float32 [S] at `rate` Hz, uint32 [T]."""
    maker = Fingerprinter(rate)
    maker.add(mono)
    return maker.finish()


def _words(magnitudes: np.ndarray) -> np.ndarray:
    """Magnitudes of consecutive frames, float32 [M, BITS + 1] -> uint32 [max(0, M - _LAG)]."""
    later, earlier = magnitudes[_LAG:], magnitudes[: max(0, len(magnitudes) - _LAG)]
    slope = magnitudes[:, :-1] - magnitudes[:, 1:]
    change = slope[_LAG:] - slope[: len(earlier)]
    words = np.packbits(change > 0, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)
    level = np.sqrt(np.minimum(np.square(later).sum(axis=1), np.square(earlier).sum(axis=1)))
    telling = (level > _SILENT) & (np.abs(change).sum(axis=1) > _STEADY * (later + earlier).sum(axis=1))
    return np.where(telling, np.maximum(words, 1), 0).astype(np.uint32)


def bit_error_rate(a: np.ndarray, b: np.ndarray, least: int) -> Alignment:
    """The best of all alignments that compare at least `least` words; NONE where there is none.

    The best is the least likely one by chance: (0.5 - rate) times the root of the overlap is the largest.

    Args:
        a, b: fingerprints, uint32 [T].
        least: words, 1 or more.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    if min(np.count_nonzero(a), np.count_nonzero(b)) < least:
        return NONE
    size = next_fast_len(len(a) + len(b), True)
    product = np.conj(rfft(_signs(b), size, axis=1)) * rfft(_signs(a), size, axis=1)
    agreement = irfft(product[:-1].sum(axis=0), size)
    overlap = np.round(irfft(product[-1], size))
    enough = overlap >= least
    if not enough.any():
        return NONE
    score = np.where(enough, agreement / np.sqrt(np.maximum(overlap, 1)), -np.inf)
    offset = int(np.argmax(score))
    return at_offset(a, b, offset if offset < len(a) else offset - size)


def at_offset(a: np.ndarray, b: np.ndarray, offset: int) -> Alignment:
    """Two fingerprints compared where the second begins `offset` words into the first."""
    first, second = a[max(0, offset) :], b[max(0, -offset) :]
    length = min(len(first), len(second))
    first, second = first[:length], second[:length]
    telling = (first != 0) & (second != 0)
    overlap = int(np.count_nonzero(telling))
    if overlap == 0:
        return NONE
    errors = int(np.bitwise_count(first ^ second)[telling].sum())
    return Alignment(offset, errors / (BITS * overlap), overlap)


def _signs(words: np.ndarray) -> np.ndarray:
    """The bits as -1 and 1, and a last row of ones; 0 where a word tells nothing. float32 [BITS + 1, T]"""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    rows = np.concatenate([bits.T * np.float32(2) - 1, np.ones((1, len(words)), np.float32)])
    return np.where(words != 0, rows, np.float32(0))
