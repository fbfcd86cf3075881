"""Which of many sounds are the same: pairs of fingerprints that agree, found without comparing all with all.

What two sounds have in common votes for the pair and for how they lie upon each other; where enough agree, the two are
compared bit by bit. Votes are gathered in passes over a part of the words each and wait on the disk, so that memory
stays within a limit however many sounds there are. The work grows with the words of all sounds; with their square only
as far as chance brings words together, and each is then paired with its few next alone.

Shapes: N sounds, T words of one, P pairs.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmttm.audio.fingerprint import NONE, RATE, Alignment, at_offset, bit_error_rate
from ssmttm.errors import UserError

SAME, SUSPECT = 0.22, 0.35  # bit error rates: benchmarks/duplicates.py
_LEAST = 8 * RATE  # words of the shortest overlap that counts
_LAG = 4  # words apart that a gram's two words stand: they have no frame in common
_GRAM_BITS = 20  # of either word, those of the lowest bands
_REACH = 4  # sounds that a gram's next ones are paired with
_COMMON = 1_000  # sounds with one gram: it tells nothing
_VOTES = 2  # for one offset
_MANY_VOTES = 3  # for any: loops say the same at many places
_UNRELATED = 0.44  # bit error rate over which no better offset is looked for
_WHOLE = 0.9  # of the shorter sound, where no better offset is looked for
_PARTS = 64  # files that votes wait in
_OFFSET_BITS, _PAIR_BITS = 18, 23  # of a vote: half the offset, either sound
_CHUNK = 1 << 22  # words that are hashed at a time
_PER_WORD = 64  # bytes of memory for each word of a pass


@dataclass(frozen=True)
class Pairs:
    """Sounds that agree, `a` before `b`, in order.

    Attributes:
        a, b: sounds, int64 [P]. offset, rate, overlap: as in `fingerprint.Alignment`, [P].
    """

    a: np.ndarray
    b: np.ndarray
    offset: np.ndarray
    rate: np.ndarray
    overlap: np.ndarray

    def __len__(self) -> int:
        return len(self.a)

    def match(self, at: int) -> Alignment:
        """How the two of one pair agree."""
        return Alignment(int(self.offset[at]), float(self.rate[at]), int(self.overlap[at]))

    def where(self, chosen: np.ndarray) -> "Pairs":
        """The chosen ones, bool [P]."""
        return Pairs(*(column[chosen] for column in (self.a, self.b, self.offset, self.rate, self.overlap)))


def near_pairs(
    prints: Sequence[np.ndarray], order: np.ndarray | None = None, limit: float = SUSPECT, memory: int = 1 << 30,
    folder: Path | None = None,
) -> Pairs:
    """The pairs of sounds that agree over 8 s or more; of many copies of one sound, each with its next few.

    Args:
        prints: a fingerprint of each sound, uint32 [T]; they may be memory-mapped.
        order: the sounds to look at, as numbers of `prints`, int64 [N]; None for all. `Pairs` tells places in it, and
            what is found does not depend on how `prints` are ordered.
        limit: bit error rate up to which two sounds agree.
        memory: bytes, about, that are used at a time.
        folder: for what waits on the disk, up to 32 bytes a word; None is the system's.

    Raises:
        UserError: more than eight million sounds.
    """
    order = np.arange(len(prints)) if order is None else order
    if len(order) >= 1 << _PAIR_BITS:
        raise UserError(f"{len(order)} sounds are more than can be compared at once: compare them in parts")
    with tempfile.TemporaryDirectory(dir=folder) as waiting:
        votes = _Votes(Path(waiting), len(order))
        for grams in _passes(prints, order, memory):
            votes.add(grams)
        found = [(a, b, *match) for a, b, match in _agreeing(prints, order, votes, limit)]
    columns = zip(*sorted(found), strict=True) if found else [()] * 5
    return Pairs(*(np.array(column, kind) for column, kind in zip(columns, (int, int, int, float, int), strict=True)))


def groups(pairs: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
    """The group of each of n things of which some pairs belong together: the first of its group, int64 [n]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(n, n))
    _, labels = connected_components(edges, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass(frozen=True)
class _Grams:
    """Grams that several sounds have, ordered: equal ones together, and by sound within. All int64 [n]."""

    gram: np.ndarray
    sound: np.ndarray
    place: np.ndarray


def _passes(prints: Sequence[np.ndarray], order: np.ndarray, memory: int) -> Iterator[_Grams]:
    """Every sound's first of each gram, where a few other sounds have it too; a part of all grams at a time."""
    starts = np.cumsum([0, *(len(prints[sound]) for sound in order.tolist())])
    bits = max(0, int(np.ceil(np.log2(max(1, starts[-1] * _PER_WORD / memory)))))
    for turn in range(1 << bits):
        keys = _keys(prints, order, starts, bits, turn)
        keys.sort()
        yield _shared(keys, starts, bits)


def _keys(prints: Sequence[np.ndarray], order: np.ndarray, starts: np.ndarray, bits: int, turn: int) -> np.ndarray:
    """Hash (32 - bits) and place in all words (32 + bits) of each gram whose hash begins with `turn`. uint64"""
    keys = [np.empty(0, np.uint64)]
    begin = 0
    while begin < len(order):
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + _CHUNK, side="right")) - 1)
        words = np.concatenate([prints[sound] for sound in order[begin:end].tolist()])
        hashes, usable = _hashes(words, starts[begin:end] - starts[begin])
        mine = usable if bits == 0 else usable & (hashes >> np.uint32(32 - bits) == turn)
        places = np.flatnonzero(mine)
        kept = (hashes[places] << np.uint32(bits) if bits else hashes[places]).astype(np.uint64)
        keys.append((kept << np.uint64(32)) | (places + starts[begin]).astype(np.uint64))
        begin = end
    return np.concatenate(keys)


def _hashes(words: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hash of the gram that begins at each word, uint32 [T], and whether it tells anything, bool [T].

    Not so across the end of a sound, beside silence, or where it repeats the one before.
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
    """Votes of grams for two sounds and half the offset between them, one number each, in files by the first sound."""

    def __init__(self, folder: Path, sounds: int) -> None:
        self._files = [folder / f"{part:02d}.votes" for part in range(_PARTS)]
        ends = np.arange(1, _PARTS) * max(1, sounds) // _PARTS
        self._ends = ends.astype(np.uint64) << np.uint64(_PAIR_BITS + _OFFSET_BITS)

    def add(self, grams: _Grams) -> None:
        votes = np.concatenate([_votes(grams, reach) for reach in range(1, _REACH + 1)])
        votes.sort()
        for file, part in zip(self._files, np.split(votes, np.searchsorted(votes, self._ends)), strict=True):
            with file.open("ab") as held:
                part.tofile(held)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The votes, sorted, a part at a time. uint64"""
        for file in self._files:
            votes = np.fromfile(file, np.uint64) if file.exists() else np.empty(0, np.uint64)
            votes.sort()
            yield votes


def _votes(grams: _Grams, reach: int) -> np.ndarray:
    """Of each gram with the same one `reach` sounds further. uint64"""
    at = np.flatnonzero(grams.gram[reach:] == grams.gram[:-reach])
    half = (grams.place[at] - grams.place[at + reach]) // 2 + (1 << (_OFFSET_BITS - 1))
    pair = (grams.sound[at] << _PAIR_BITS) | grams.sound[at + reach]
    return ((pair << _OFFSET_BITS) | np.clip(half, 0, (1 << _OFFSET_BITS) - 1)).astype(np.uint64)


def _agreeing(
    prints: Sequence[np.ndarray], order: np.ndarray, votes: _Votes, limit: float
) -> Iterator[tuple[int, int, Alignment]]:
    """The pairs with enough votes that agree."""
    for part in votes:
        for pair, offset, many in zip(*_candidates(part), strict=True):
            a, b = pair >> _PAIR_BITS, pair & ((1 << _PAIR_BITS) - 1)
            match = _compare(prints[order[a]], prints[order[b]], offset, many)
            if match.rate <= limit and match.overlap >= _LEAST:
                yield a, b, match


def _candidates(votes: np.ndarray) -> tuple[list[int], list[int], list[bool]]:
    """Each pair with enough votes, the offset with the most (of offsets that differ by 3 at most), and whether all of
    them are many."""
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
    """The best alignment at the offset or up to 3 words later; of all where another may be better.

    That is where these agree a little, or votes are many; and where much of the shorter sound is left over, as when the
    votes were for another turn of a loop.
    """
    near = [match for later in range(4) if (match := at_offset(a, b, offset + later)).overlap >= _LEAST]
    best = min(near, key=lambda match: match.rate, default=NONE)
    if best.rate <= SAME:
        settled = best.overlap >= _WHOLE * min(len(a), len(b))
    else:
        settled = best.rate >= _UNRELATED and not many
    return best if settled else bit_error_rate(a, b, _LEAST)
