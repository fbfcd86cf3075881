"""Memorisation: the nearest training segment to a clip, by audio fingerprint and by codes.

By audio: the fraction of differing bits of fingerprints (`ssmttm.audio.fingerprint`), which survive changes of level,
noise and codecs. By codes: the longest run of codes that also occurs in the training data. Compare both with the scores
of held-out music.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio.features import SAMPLE_RATE
from ssmttm.audio.fingerprint import BITS, RATE, fingerprint
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.files import atomic_write

MAX_COPY_RATE = 0.35  # bit error rate below which Haitsma and Kalker call two clips the same
QUERY = 29  # words compared, those of 4 s of audio
_STRIDE = 3  # the first pass compares every third word
_CANDIDATES = 200  # positions that the second pass compares completely
_NGRAM = 8  # codes of the shortest run


@dataclass(frozen=True)
class Match:
    """The nearest training segment."""

    id: str
    start: float  # seconds from the start of the segment
    score: float  # bit error rate (by audio; 0 a copy, about 0.5 unrelated music), or common seconds (by codes)


class AudioIndex:
    """Concatenated fingerprints of a store's segments.

    Attributes:
        ids: of the segments. starts: start of each in `words`, and the end, [n + 1]. words: uint32 [T].
    """

    def __init__(self, ids: list[str], starts: np.ndarray, words: np.ndarray) -> None:
        self.ids, self.starts, self.words = ids, starts, words
        ends = np.repeat(starts[1:], np.diff(starts))  # of the segment that each word belongs to
        self._positions = np.flatnonzero(np.arange(len(words)) + QUERY <= ends)  # where a query fits into one segment

    @classmethod
    def build(cls, store: Store, rows: np.ndarray) -> "AudioIndex":
        """Fingerprint the rows' audio. Raises UserError if the store has no audio."""
        parts = []
        for row in tqdm(rows.tolist(), desc="fingerprints", unit="segment"):
            wav, rate = audio.read(store.audio_path(row))
            parts.append(fingerprint(wav[0].numpy(), rate))
        starts = np.cumsum([0, *map(len, parts)])
        return cls(store.ids(rows), starts, np.concatenate([np.empty(0, np.uint32), *parts]))

    def save(self, path: Path) -> None:
        """Write the index as safetensors."""
        ids = np.frombuffer("\n".join(self.ids).encode(), np.uint8)
        with atomic_write(path) as temporary:
            save_file({"ids": ids.copy(), "starts": self.starts, "words": self.words}, temporary)

    @classmethod
    def load(cls, path: Path) -> "AudioIndex":
        """Read an index. Raises UserError if the file is missing, damaged or of an older version."""
        try:
            tensors = load_file(path)
            return cls(tensors["ids"].tobytes().decode().split("\n"), tensors["starts"], tensors["words"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"cannot read the index {path} ({error}): build it again") from error

    def nearest(self, wav: Tensor) -> Match:
        """The best match of the middle 4 s of audio [1, S] at `features.SAMPLE_RATE`."""
        query = fingerprint(wav[0].numpy(), SAMPLE_RATE)
        if len(query) < QUERY:
            raise UserError(f"{wav.shape[-1] / SAMPLE_RATE:.1f} s of audio are too short to be recognised: give 4 s")
        if len(self._positions) == 0:
            raise UserError(f"none of the {len(self.ids)} segments of the index lasts 4 s: index longer ones")
        middle = (len(query) - QUERY) // 2
        query = query[middle : middle + QUERY]
        count = len(self.words) - QUERY + 1
        differing = np.zeros(count, np.uint16)
        for i in range(0, QUERY, _STRIDE):
            differing += _bit_errors(self.words[i : i + count], query[i])
        nearest = np.argpartition(differing[self._positions], min(_CANDIDATES, len(self._positions) - 1))
        candidates = self._positions[nearest[:_CANDIDATES]]
        rates = _bit_errors(self.words[candidates[:, None] + np.arange(QUERY)], query).sum(1) / (QUERY * BITS)
        position = int(candidates[rates.argmin()])
        segment = int(np.searchsorted(self.starts, position, side="right")) - 1
        return Match(self.ids[segment], (position - int(self.starts[segment])) / RATE, float(rates.min()))


class CodeIndex:
    """Hashed n-grams of the first codebook's codes of a store's segments."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        bar = tqdm(rows.tolist(), desc="codes", unit="segment")
        codes = [store.codes(row)[0].astype(np.uint64) for row in bar]
        self.ids, self.frame_rate = store.ids(rows), float(store.info["codec"]["frame_rate"])
        self._starts = np.cumsum([0, *map(len, codes)])
        ngrams = _ngram_hashes(np.concatenate([np.empty(0, np.uint64), *codes]))
        segment = np.searchsorted(self._starts, np.arange(len(ngrams)), side="right") - 1
        positions = np.flatnonzero(np.arange(len(ngrams)) + _NGRAM <= self._starts[segment + 1])
        order = np.argsort(ngrams[positions], kind="stable")
        self._positions, self._ngrams = positions[order], ngrams[positions][order]

    def longest(self, codes: np.ndarray) -> Match | None:
        """The longest run of codes [T] of the first codebook that also occurs in a segment; None below 8 codes."""
        longest, end = 0, -1
        runs: dict[int, int] = {}  # position of the last n-gram: length of the run
        for ngram in _ngram_hashes(codes.astype(np.uint64)):
            low, high = np.searchsorted(self._ngrams, ngram, "left"), np.searchsorted(self._ngrams, ngram, "right")
            runs = {int(place): runs.get(int(place) - 1, _NGRAM - 1) + 1 for place in self._positions[low:high]}
            if runs and max(runs.values()) > longest:
                end = max(runs, key=runs.__getitem__)
                longest = runs[end]
        if end < 0:
            return None
        segment = int(np.searchsorted(self._starts, end, side="right")) - 1
        first = end + _NGRAM - longest - int(self._starts[segment])
        return Match(self.ids[segment], first / self.frame_rate, longest / self.frame_rate)


def _bit_errors(words: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Differing bits of each word; half of the bits where either word is 0, which carries no information."""
    return np.where((words != 0) & (query != 0), np.bitwise_count(words ^ query), BITS // 2)


def _ngram_hashes(codes: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of _NGRAM codes. [T - _NGRAM + 1]"""
    total = np.zeros(max(0, len(codes) - _NGRAM + 1), np.uint64)
    with np.errstate(over="ignore"):
        for i in range(_NGRAM):
            total = (total ^ codes[i : i + len(total)]) * np.uint64(0x9E3779B97F4A7C15)
            total ^= total >> np.uint64(29)
    return total
