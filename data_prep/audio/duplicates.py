"""Near-duplicate detection: pairs of matching fingerprints, found without comparing all with all.

N-grams shared by two recordings vote for the pair and its offset; pairs with enough votes are compared bit by bit.
Votes are collected in passes over a part of the n-grams each and kept on disk, so that memory stays within a limit for
any number of recordings. The work grows linearly with the number of sub-fingerprints, except for chance matches, which
are paired with their next few neighbours only.

Shapes: N recordings, T sub-fingerprints (words) of one, P pairs.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmttm.audio.fingerprint import NONE, RATE, Alignment, at_offset, bit_error_rate
from ssmttm.errors import UserError

SAME, SUSPECT = 0.22, 0.35  # bit error rates: benchmarks/duplicates.py
_LEAST = 8 * RATE  # words of the shortest valid overlap
_LAG = 4  # distance of the two words of an n-gram: they share no frame
_GRAM_BITS = 20  # bits of either word, from the lowest bands
_REACH = 4  # neighbours that each n-gram is paired with
_COMMON = 1_000  # n-grams in more recordings are ignored
_VOTES = 2  # for one offset
_MANY_VOTES = 3  # for any offset: loops match at many offsets
_UNRELATED = 0.44  # bit error rate above which no better offset is searched
_WHOLE = 0.9  # overlap, as a fraction of the shorter one, from which no better offset is searched
_PARTS = 64  # files of votes
_OFFSET_BITS, _PAIR_BITS = 18, 23  # of a vote: half the offset, either recording
_CHUNK = 1 << 22  # words hashed at a time
_PER_WORD = 64  # bytes of memory for each word of a pass


@dataclass(frozen=True)
class Pairs:
    """Matching recordings, `a` before `b`, in order.

    Attributes:
        a, b: recordings, int64 [P]. offset, rate, overlap: as in `fingerprint.Alignment`, [P].
    """

    a: np.ndarray
    b: np.ndarray
    offset: np.ndarray
    rate: np.ndarray
    overlap: np.ndarray

    def __len__(self) -> int:
        return len(self.a)

    def match(self, index: int) -> Alignment:
        """The alignment of one pair."""
        return Alignment(int(self.offset[index]), float(self.rate[index]), int(self.overlap[index]))

    def select(self, chosen: np.ndarray) -> "Pairs":
        """The pairs where `chosen`, bool [P], is True."""
        return Pairs(*(column[chosen] for column in (self.a, self.b, self.offset, self.rate, self.overlap)))


def near_pairs(
    prints: Sequence[np.ndarray], order: np.ndarray | None = None, limit: float = SUSPECT, memory: int = 1 << 30,
    folder: Path | None = None,
) -> Pairs:
    """The pairs of recordings that match over 8 s or more; of many copies, each with its next few.

    Args:
        prints: a fingerprint of each recording, uint32 [T]; they may be memory-mapped.
        order: the recordings to compare, as indices of `prints`, int64 [N]; None for all. `Pairs` holds indices of it;
            the result does not depend on the order of `prints`.
        limit: bit error rate up to which two recordings match.
        memory: approximate bytes in use at a time.
        folder: for temporary files, up to 32 bytes per word; None is that of the system.

    Raises:
        UserError: more than eight million recordings.
    """
    order = np.arange(len(prints)) if order is None else order
    if len(order) >= 1 << _PAIR_BITS:
        raise UserError(f"{len(order)} recordings are too many to compare at once: compare them in parts")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        votes = _Votes(Path(temporary), len(order))
        for grams in _passes(prints, order, memory):
            votes.add(grams)
        found = [(a, b, *match) for a, b, match in _matching(prints, order, votes, limit)]
    columns = zip(*sorted(found), strict=True) if found else [()] * 5
    return Pairs(*(np.array(column, kind) for column, kind in zip(columns, (int, int, int, float, int), strict=True)))


def groups(pairs: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
    """Connected components: for each of n items the first item of its group, int64 [n]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(n, n))
    _, labels = connected_components(edges, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass(frozen=True)
class _Grams:
    """N-grams shared by several recordings, sorted by n-gram, then by recording. All int64 [n]."""

    gram: np.ndarray
    sound: np.ndarray
    place: np.ndarray


def _passes(prints: Sequence[np.ndarray], order: np.ndarray, memory: int) -> Iterator[_Grams]:
    """The first occurrence per recording of every shared n-gram; a part of all n-grams at a time."""
    starts = np.cumsum([0, *(len(prints[sound]) for sound in order.tolist())])
    bits = max(0, int(np.ceil(np.log2(max(1, starts[-1] * _PER_WORD / memory)))))
    for part in range(1 << bits):
        keys = _keys(prints, order, starts, bits, part)
        keys.sort()
        yield _shared(keys, starts, bits)


def _keys(prints: Sequence[np.ndarray], order: np.ndarray, starts: np.ndarray, bits: int, part: int) -> np.ndarray:
    """Hash (32 - bits) and position (32 + bits) of each n-gram whose hash begins with `part`, uint64."""
    keys = [np.empty(0, np.uint64)]
    begin = 0
    while begin < len(order):
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + _CHUNK, side="right")) - 1)
        words = np.concatenate([prints[sound] for sound in order[begin:end].tolist()])
        hashes, usable = _hashes(words, starts[begin:end] - starts[begin])
        mine = usable if bits == 0 else usable & (hashes >> np.uint32(32 - bits) == part)
        places = np.flatnonzero(mine)
        kept = (hashes[places] << np.uint32(bits) if bits else hashes[places]).astype(np.uint64)
        keys.append((kept << np.uint64(32)) | (places + starts[begin]).astype(np.uint64))
        begin = end
    return np.concatenate(keys)


def _hashes(words: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hash of the n-gram that begins at each word, uint32 [T], and whether it is usable, bool [T].

    It is not across the end of a recording, beside silence, or where it repeats the one before.
    """
    hashes, usable = np.zeros(len(words), np.uint32), np.zeros(len(words), bool)
    if len(words) <= _LAG:
        return hashes, usable
    low = words & np.uint32((1 << _GRAM_BITS) - 1)
    gram = (low[:-_LAG].astype(np.uint64) << np.uint64(_GRAM_BITS)) | low[_LAG:]
    usable[:-_LAG] = (words[:-_LAG] != 0) & (words[_LAG:] != 0)
    repeated = np.concatenate([[False], gram[1:] == gram[:-1]])
    repeated[begins[begins < len(gram)]] = False
    usable[:-_LAG] &= ~repeated
    for back in range(1, _LAG + 1):
        usable[begins[begins >= back] - back] = False
    with np.errstate(over="ignore"):
        hashes[:-_LAG] = (gram * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return hashes, usable


def _shared(keys: np.ndarray, starts: np.ndarray, bits: int) -> _Grams:
    grams = keys >> np.uint64(32 + bits)
    same = grams[1:] == grams[:-1]
    several = np.zeros(len(keys), bool)
    several[1:] |= same
    several[:-1] |= same
    keys, grams = keys[several], grams[several].astype(np.int64)
    place = (keys & np.uint64((1 << (32 + bits)) - 1)).astype(np.int64)
    sound = np.searchsorted(starts, place, side="right") - 1
    first = np.ones(len(keys), bool)
    first[1:] = (grams[1:] != grams[:-1]) | (sound[1:] != sound[:-1])
    grams, sound, place = grams[first], sound[first], (place - starts[sound])[first]
    runs = np.flatnonzero(np.diff(grams, prepend=-1))
    rare = np.repeat(np.diff(runs, append=len(grams)) <= _COMMON, np.diff(runs, append=len(grams)))
    return _Grams(grams[rare], sound[rare], place[rare])


class _Votes:
    """Votes for two recordings and half their offset, one number each, in files by the first recording."""

    def __init__(self, folder: Path, sounds: int) -> None:
        self._files = [folder / f"{part:02d}.votes" for part in range(_PARTS)]
        ends = np.arange(1, _PARTS) * max(1, sounds) // _PARTS
        self._ends = ends.astype(np.uint64) << np.uint64(_PAIR_BITS + _OFFSET_BITS)

    def add(self, grams: _Grams) -> None:
        votes = np.concatenate([_votes(grams, reach) for reach in range(1, _REACH + 1)])
        votes.sort()
        for file, part in zip(self._files, np.split(votes, np.searchsorted(votes, self._ends)), strict=True):
            with file.open("ab") as out:
                part.tofile(out)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The votes, sorted, a part at a time, uint64."""
        for file in self._files:
            votes = np.fromfile(file, np.uint64) if file.exists() else np.empty(0, np.uint64)
            votes.sort()
            yield votes


def _votes(grams: _Grams, reach: int) -> np.ndarray:
    """Votes of each n-gram with the same one `reach` recordings further, uint64."""
    first = np.flatnonzero(grams.gram[reach:] == grams.gram[:-reach])
    half = (grams.place[first] - grams.place[first + reach]) // 2 + (1 << (_OFFSET_BITS - 1))
    pair = (grams.sound[first] << _PAIR_BITS) | grams.sound[first + reach]
    return ((pair << _OFFSET_BITS) | np.clip(half, 0, (1 << _OFFSET_BITS) - 1)).astype(np.uint64)


def _matching(
    prints: Sequence[np.ndarray], order: np.ndarray, votes: _Votes, limit: float
) -> Iterator[tuple[int, int, Alignment]]:
    """The pairs with enough votes that match."""
    for part in votes:
        for pair, offset, many in zip(*_candidates(part), strict=True):
            a, b = pair >> _PAIR_BITS, pair & ((1 << _PAIR_BITS) - 1)
            match = _compare(prints[order[a]], prints[order[b]], offset, many)
            if match.rate <= limit and match.overlap >= _LEAST:
                yield a, b, match


def _candidates(votes: np.ndarray) -> tuple[list[int], list[int], list[bool]]:
    """Each pair with enough votes, its best offset (votes for neighbouring offsets count together), and whether it has
    many votes."""
    vote, count = np.unique(votes, return_counts=True)
    vote = vote.astype(np.int64)
    pair, first, inverse = np.unique(vote >> _OFFSET_BITS, return_index=True, return_inverse=True)
    many = np.bincount(inverse, count, len(pair)) >= _MANY_VOTES
    count[:-1] += np.where(vote[1:] == vote[:-1] + 1, count[1:], 0)
    most = np.maximum.reduceat(count, first) if len(pair) else count
    best = np.flatnonzero(count == most[inverse])
    best = best[np.unique(inverse[best], return_index=True)[1]]
    half = (vote[best] & ((1 << _OFFSET_BITS) - 1)) - (1 << (_OFFSET_BITS - 1))
    enough = (most >= _VOTES) | many
    return pair[enough].tolist(), (2 * half[enough]).tolist(), many[enough].tolist()


def _compare(a: np.ndarray, b: np.ndarray, offset: int, many: bool) -> Alignment:
    """The best alignment at the offset or up to 3 words later, or of all offsets where another may be better.

    That is so for a weak match, for many votes, and where much of the shorter recording does not overlap, as when the
    votes were for another repetition of a loop.
    """
    near = [match for later in range(4) if (match := at_offset(a, b, offset + later)).overlap >= _LEAST]
    best = min(near, key=lambda match: match.rate, default=NONE)
    if best.rate <= SAME:
        settled = best.overlap >= _WHOLE * min(len(a), len(b))
    else:
        settled = best.rate >= _UNRELATED and not many
    return best if settled else bit_error_rate(a, b, _LEAST)
