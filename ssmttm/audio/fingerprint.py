"""Audio fingerprints: ten 32-bit words a second that are robust to encoding, gain, trimming and resampling.

A bit is the sign of the change over time of the difference between two adjacent frequency bands (Haitsma and Kalker, A
Highly Robust Audio Fingerprinting System, ISMIR 2002). Here bands are magnitudes over frames of 0.74 s with a lag of
0.4 s, so that words with frames up to half a hop apart still agree. A word of 0 marks a frame without information:
silence or a constant sound. `benchmarks/duplicates.py` measures these choices. Changes of pitch or speed are not
recognised.

Shapes: T words, M frames, S samples.
"""

from typing import NamedTuple

import numpy as np

RATE = 10  # words a second
BITS = 32
_LOW, _HIGH = 300.0, 3_000.0  # Hz, range of the bands
_FRAME = 0.74  # seconds
_LAG = 4  # frames between the two frames that are compared
_SPAN = 50  # frames processed at once: a whole number of samples at any rate
_INNER = 8_000  # Hz, the lowest rate after decimation
_TAPS = 16  # low-pass filter taps per decimation factor
_SILENT = 10 ** (-72 / 20)  # root mean square
_STEADY = 0.01  # relative change of the spectrum


class Alignment(NamedTuple):
    """The best alignment of two fingerprints."""

    offset: int  # words from the start of the first to the start of the second
    rate: float  # bit error rate: 0 for a copy, about 0.5 for unrelated audio
    overlap: int  # number of compared words, without words of 0


NONE = Alignment(0, 1.0, 0)


class Fingerprinter:
    """Fingerprints streamed audio; the result does not depend on the block sizes."""

    def __init__(self, rate: int) -> None:
        """`rate`: sample rate in Hz."""
        from scipy.fft import next_fast_len
        from scipy.signal import firwin

        self._starts = np.round(np.arange(_SPAN + 1) * rate / RATE).astype(np.int64)  # of the frames and the next span
        self._length = round(_FRAME * rate)  # samples of a frame
        self._needed = int(self._starts[_SPAN - 1]) + self._length  # samples of a span
        self._factor = max(1, rate // _INNER)  # of the decimation
        if self._factor > 1:
            taps = firwin(self._factor * _TAPS, (_HIGH + 1_000) / (rate / 2), window=("kaiser", 5.6))
            self._filter = taps.reshape(_TAPS, self._factor).astype(np.float32)  # low-pass in polyphase form
        window = np.hanning(self._length // self._factor - _TAPS)
        self._fft_size = next_fast_len(len(window), True)
        scale = np.sqrt(2 / (self._fft_size * np.square(window).sum()))  # squared magnitudes sum to the mean square
        self._window = (window * scale).astype(np.float32)
        hertz = np.geomspace(_LOW, _HIGH, BITS + 2)
        edges = np.minimum(np.round(hertz * self._fft_size * self._factor / rate), self._fft_size // 2)
        self._edges = edges.astype(np.int64)  # first bin of each band, and the end of the last
        self._pending: list[np.ndarray] = []
        self._count = 0  # pending samples
        self._previous = np.empty((0, BITS + 1), np.float32)  # magnitudes of the last _LAG frames
        self._words: list[np.ndarray] = []

    def add(self, mono: np.ndarray) -> None:
        """Add samples, float32 [s], finite."""
        self._pending.append(np.array(mono, np.float32))
        self._count += len(mono)
        if self._count < self._needed:
            return
        samples = np.concatenate(self._pending)
        while len(samples) >= self._needed:
            self._process(samples[: self._needed], _SPAN)
            samples = samples[self._starts[_SPAN] :]
        self._pending, self._count = [samples], len(samples)

    def finish(self) -> np.ndarray:
        """The fingerprint, uint32 [T]; empty for less than 1.2 s of audio."""
        padding = np.zeros(self._needed - self._count, np.float32)
        frames = int(np.sum(self._starts[:_SPAN] + self._length <= self._count))
        self._process(np.concatenate([*self._pending, padding]), frames)
        return np.concatenate([np.empty(0, np.uint32), *self._words])

    def _process(self, samples: np.ndarray, frames: int) -> None:
        magnitudes = np.concatenate([self._previous, self._magnitudes(samples)[:frames]])
        self._words.append(_words(magnitudes))
        self._previous = magnitudes[-_LAG:]

    def _magnitudes(self, samples: np.ndarray) -> np.ndarray:
        """Band magnitudes of a span's frames, float32 [_SPAN, BITS + 1]."""
        from scipy.fft import rfft

        decimated = self._decimate(samples)
        windows = np.lib.stride_tricks.sliding_window_view(decimated, len(self._window))
        frames = windows[self._starts[:_SPAN] // self._factor] * self._window
        spectrum = rfft(frames, self._fft_size, axis=1)[:, : self._edges[-1] + 1]
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        return np.sqrt(np.add.reduceat(power, self._edges, axis=1)[:, :-1])

    def _decimate(self, samples: np.ndarray) -> np.ndarray:
        """Low-pass, and keep every _factor-th sample."""
        if self._factor == 1:
            return samples
        length = len(samples) // self._factor
        parts = self._filter @ samples[: length * self._factor].reshape(length, self._factor).T  # [_TAPS, length]
        filtered = np.zeros(length - _TAPS + 1, np.float32)
        for tap, part in enumerate(parts):
            filtered += part[tap : tap + len(filtered)]
        return filtered


def fingerprint(mono: np.ndarray, rate: int) -> np.ndarray:
    """The fingerprint of float32 [S] at `rate` Hz, uint32 [T]."""
    fingerprinter = Fingerprinter(rate)
    fingerprinter.add(mono)
    return fingerprinter.finish()


def _words(magnitudes: np.ndarray) -> np.ndarray:
    """Magnitudes of consecutive frames, float32 [M, BITS + 1] -> uint32 [max(0, M - _LAG)]."""
    later, earlier = magnitudes[_LAG:], magnitudes[: max(0, len(magnitudes) - _LAG)]
    slope = magnitudes[:, :-1] - magnitudes[:, 1:]
    change = slope[_LAG:] - slope[: len(earlier)]
    words = np.packbits(change > 0, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)
    level = np.sqrt(np.minimum(np.square(later).sum(axis=1), np.square(earlier).sum(axis=1)))
    informative = (level > _SILENT) & (np.abs(change).sum(axis=1) > _STEADY * (later + earlier).sum(axis=1))
    return np.where(informative, np.maximum(words, 1), 0).astype(np.uint32)


def bit_error_rate(a: np.ndarray, b: np.ndarray, min_overlap: int) -> Alignment:
    """The best alignment with an overlap of at least `min_overlap` words; NONE if there is none.

    The best one is the least likely by chance: it maximises (0.5 - rate) times the root of the overlap.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    if min(np.count_nonzero(a), np.count_nonzero(b)) < min_overlap:
        return NONE
    size = next_fast_len(len(a) + len(b), True)
    product = np.conj(rfft(_signs(b), size, axis=1)) * rfft(_signs(a), size, axis=1)
    agreement = irfft(product[:-1].sum(axis=0), size)
    overlap = np.round(irfft(product[-1], size))
    enough = overlap >= min_overlap
    if not enough.any():
        return NONE
    score = np.where(enough, agreement / np.sqrt(np.maximum(overlap, 1)), -np.inf)
    offset = int(np.argmax(score))
    return at_offset(a, b, offset if offset < len(a) else offset - size)


def at_offset(a: np.ndarray, b: np.ndarray, offset: int) -> Alignment:
    """Compare two fingerprints with the second starting `offset` words into the first."""
    first, second = a[max(0, offset) :], b[max(0, -offset) :]
    length = min(len(first), len(second))
    first, second = first[:length], second[:length]
    informative = (first != 0) & (second != 0)
    overlap = int(np.count_nonzero(informative))
    if overlap == 0:
        return NONE
    errors = int(np.bitwise_count(first ^ second)[informative].sum())
    return Alignment(offset, errors / (BITS * overlap), overlap)


def _signs(words: np.ndarray) -> np.ndarray:
    """The bits as -1 and 1, and a last row of ones; all 0 for a word of 0. float32 [BITS + 1, T]"""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    rows = np.concatenate([bits.T * np.float32(2) - 1, np.ones((1, len(words)), np.float32)])
    return np.where(words != 0, rows, np.float32(0))
