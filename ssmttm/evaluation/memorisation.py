"""Is a piece a copy of what the model learnt from? The nearest training segment, by sound and by codes.

By sound: one bit for each time and pair of neighbouring frequency bands, whether their difference of energy rises
(Haitsma and Kalker, A Highly Robust Audio Fingerprinting System, ISMIR 2002): level, noise and a codec change few bits.
By codes: the longest run of codes that stands in the training data too. What held-out music scores is the measure of
both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio.features import SAMPLE_RATE
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.files import atomic_write

RATE = 20  # fingerprints a second
SUSPECT = 0.35  # share of differing bits under which Haitsma and Kalker call two pieces the same
_BITS, _LOW, _HIGH = 32, 300.0, 3_000.0  # bits of a fingerprint, Hz
_FFT = 8_192  # 0.34 s
_QUERY = 3 * RATE  # fingerprints that are compared: 3 s
_COARSE = 6  # of which every so manieth is looked at first
_KEPT = 200  # best places of the first look
_GRAM = 8  # codes of the shortest run


@dataclass(frozen=True)
class Match:
    """The nearest training segment.

    Attributes:
        id: of the segment. start: seconds into it where the match begins.
        score: share of differing bits (by sound; 0 a copy, about 0.5 unrelated), or seconds in common (by codes).
    """

    id: str
    start: float
    score: float


def fingerprints(wav: Tensor) -> np.ndarray:
    """Audio [1, S] at `features.SAMPLE_RATE` -> uint32 [T] at RATE."""
    window = torch.hann_window(_FFT)
    spectrum = torch.stft(wav[0], _FFT, SAMPLE_RATE // RATE, window=window, center=False, return_complex=True).abs()
    edges = torch.logspace(np.log10(_LOW), np.log10(_HIGH), _BITS + 2, dtype=torch.float64)
    bins = (edges / SAMPLE_RATE * _FFT).round().long()
    sums = torch.nn.functional.pad(spectrum.square().cumsum(0), (0, 0, 1, 0))
    energy = (sums[bins[1:]] - sums[bins[:-1]]).log1p()  # [33, T]
    slope = energy[:-1] - energy[1:]  # [32, T]
    rises = (slope[:, 1:] > slope[:, :-1]).numpy()
    return np.bitwise_or.reduce(rises.astype(np.uint32) << np.arange(_BITS, dtype=np.uint32)[:, None], axis=0)


class AudioIndex:
    """Fingerprints of a store's segments, one after the other.

    Attributes:
        ids: of the segments. starts: where each begins in `prints`, and the end, [n + 1]. prints: uint32 [T].
    """

    def __init__(self, ids: list[str], starts: np.ndarray, prints: np.ndarray) -> None:
        self.ids, self.starts, self.prints = ids, starts, prints
        ends = np.repeat(starts[1:], np.diff(starts))  # of the segment that each fingerprint lies in
        self._places = np.flatnonzero(np.arange(len(prints)) + _QUERY <= ends)  # where a query lies within one segment

    @classmethod
    def build(cls, store: Store, rows: np.ndarray) -> "AudioIndex":
        """Hear the rows' audio. Raises UserError if the store keeps none."""
        parts = []
        for row in tqdm(rows.tolist(), desc="fingerprints", unit="segment"):
            wav, _ = audio.read(store.audio_path(row), SAMPLE_RATE)
            parts.append(fingerprints(wav) if wav.shape[-1] > 2 * _FFT else np.empty(0, np.uint32))
        starts = np.cumsum([0, *map(len, parts)])
        return cls(store.ids(rows), starts, np.concatenate([np.empty(0, np.uint32), *parts]))

    def save(self, path: Path) -> None:
        """Write as safetensors, to be built once."""
        names = np.frombuffer("\n".join(self.ids).encode(), np.uint8)
        with atomic_write(path) as aside:
            save_file({"ids": names.copy(), "starts": self.starts, "prints": self.prints}, aside)

    @classmethod
    def load(cls, path: Path) -> "AudioIndex":
        """What `save` wrote. Raises UserError if there is no such file, or a damaged one."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no index that can be read ({error}): build it again") from error
        return cls(tensors["ids"].tobytes().decode().split("\n"), tensors["starts"], tensors["prints"])

    def nearest(self, wav: Tensor) -> Match:
        """The best match of the middle 3 s of audio [1, S] at `features.SAMPLE_RATE`.

        Raises:
            UserError: less than 4 s of audio, or no segment of that length to compare it with.
        """
        query = fingerprints(wav) if wav.shape[-1] > 2 * _FFT else np.empty(0, np.uint32)
        if len(query) < _QUERY:
            raise UserError(f"{wav.shape[-1] / SAMPLE_RATE:.1f} s of audio are too short to be recognised: give 4 s")
        if len(self._places) == 0:
            raise UserError(f"none of the {len(self.ids)} segments of the index lasts 4 s: index longer ones")
        middle = (len(query) - _QUERY) // 2
        query = query[middle : middle + _QUERY]
        count = len(self.prints) - _QUERY + 1
        differing = np.zeros(count, np.uint16)
        for i in range(0, _QUERY, _COARSE):
            differing += np.bitwise_count(self.prints[i : i + count] ^ query[i])
        best = self._places[np.argpartition(differing[self._places], min(_KEPT, len(self._places) - 1))[:_KEPT]]
        windows = self.prints[best[:, None] + np.arange(_QUERY)]
        errors = np.bitwise_count(windows ^ query).sum(1) / (_QUERY * _BITS)
        found = int(best[errors.argmin()])
        owner = int(np.searchsorted(self.starts, found, side="right")) - 1
        return Match(self.ids[owner], (found - int(self.starts[owner])) / RATE, float(errors.min()))


class CodeIndex:
    """Runs of the first codebook's codes in a store's segments, found by their hash."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        bar = tqdm(rows.tolist(), desc="codes", unit="segment")
        codes = [store.codes(row)[0].astype(np.uint64) for row in bar]
        self.ids, self.frame_rate = store.ids(rows), float(store.info["codec"]["frame_rate"])
        self._starts = np.cumsum([0, *map(len, codes)])
        self._codes = np.concatenate([np.empty(0, np.uint64), *codes])
        grams = _hashes(self._codes)
        segment = np.searchsorted(self._starts, np.arange(len(grams)), side="right") - 1
        inside = np.arange(len(grams)) + _GRAM <= self._starts[segment + 1]
        places = np.flatnonzero(inside)
        order = np.argsort(grams[places], kind="stable")
        self._places, self._grams = places[order], grams[places][order]

    def longest(self, codes: np.ndarray) -> Match | None:
        """The longest run of codes [T] of the first codebook that a segment holds too; None under 8 codes."""
        query = codes.astype(np.uint64)
        best, where = 0, -1
        runs: dict[int, int] = {}
        for gram in _hashes(query):
            low, high = np.searchsorted(self._grams, gram, "left"), np.searchsorted(self._grams, gram, "right")
            runs = {int(place): runs.get(int(place) - 1, _GRAM - 1) + 1 for place in self._places[low:high]}
            if runs and max(runs.values()) > best:
                where = max(runs, key=runs.__getitem__)
                best = runs[where]
        if where < 0:
            return None
        owner = int(np.searchsorted(self._starts, where, side="right")) - 1
        first = where + _GRAM - best - int(self._starts[owner])
        return Match(self.ids[owner], first / self.frame_rate, best / self.frame_rate)


def _hashes(codes: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of _GRAM codes. [T - _GRAM + 1]"""
    total = np.zeros(max(0, len(codes) - _GRAM + 1), np.uint64)
    with np.errstate(over="ignore"):
        for i in range(_GRAM):
            total = (total ^ codes[i : i + len(total)]) * np.uint64(0x9E3779B97F4A7C15)
            total ^= total >> np.uint64(29)
    return total
