"""Which tracks make the corpus, and in which split: every recording once, nothing of an evaluation set, artists apart.

Pure functions of the tracks' metadata, hashes and fingerprints; how the rows are ordered changes nothing. In order:

1. Same file, same samples, nearly the same sound (fingerprints, a clip of a longer one too).
2. Left out: tracks whose work, artist or sound is in an evaluation set, all that are the same recording, and what
   shares some sound with them.
3. Of the same recording the best described one stays: with captions, with more metadata, with the freer licence, the
   longer, the first by id. Nothing is left out but for its likeness to a track that stays.
4. Splits: as the source says, else by artist, else by the recording.

Shapes: N tracks with a sound, in the order of their ids.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.audio.duplicates import SAME, SUSPECT, Pairs, groups, near_pairs
from data_prep.track import Rejection
from ssmttm.audio.fingerprint import NONE, RATE, Alignment, bit_error_rate
from ssmttm.data.splits import SPLITS, split_by_hash
from ssmttm.errors import UserError
from ssmttm.licences import POLICIES, allowed, normalise

KEPT = pa.schema({"id": pa.string(), "split": pa.string()})
_SHARE = 0.8  # of the shorter sound, that must agree
_COMPARED = 16  # of the tracks that stay of one recording, at most
_DESCRIBED = ("title", "author", "source_url", "artist", "work", "evidence")
_SHOWN = 100  # suspected pairs in the report


class ReferenceSet(Protocol):
    """An evaluation set, as `data_prep.sources.references` reads it."""

    name: str
    works: Collection[str]
    artists: Collection[str]
    audio: Sequence[Path]


@dataclass(frozen=True)
class Reference:
    """An evaluation set, and the fingerprint uint32 [T] of each of its audio files, empty for what cannot be heard."""

    set: ReferenceSet
    prints: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
        kept: id and split of each track that stays, by id.
        refusals: of all others that have a sound, by id.
        report: counts and reasons, for JSON.
    """

    kept: pa.Table
    rejections: list[Rejection]
    report: dict[str, Any]


def select(
    tracks: pa.Table, sounds: pa.Table, prints: Iterable[np.ndarray], references: Sequence[Reference] = (),
    memory: int = 1 << 30, folder: Path | None = None,
) -> Selection:
    """Choose among tracks.

    Args:
        tracks, sounds: `data_prep.tables.TRACKS` and SOUNDS, each id once; a track without a sound is no matter here.
        prints: the fingerprint of each row of `sounds`, uint32 [T], maybe memory-mapped.
        references: what must not be in the corpus.
        memory, folder: as for `data_prep.audio.duplicates.near_pairs`.
    """
    heard = _AudioRows.of(tracks, sounds)
    exact = _exact_groups(heard)
    best = _best_of(exact, heard.rank)
    unique = np.flatnonzero(best == np.arange(len(best)))
    alike = _near_duplicates(heard, unique, list(prints), references, memory, folder)
    reasons = _evaluated(heard, exact, alike, references)
    kept = ~np.isin(np.arange(len(heard)), list(reasons))
    duplicates = _duplicates(heard, best, alike, kept)
    kept[list(duplicates)] = False
    links = alike.links[:, kept[alike.links].all(axis=0)]
    splits, divided_by = _splits(heard, np.flatnonzero(kept), links)
    rejections = [Rejection(heard.ids[row], "evaluation", reason) for row, (_, reason) in reasons.items()]
    rejections += [Rejection(heard.ids[row], "duplicate", f"it is {reason}") for row, (_, reason) in duplicates.items()]
    ids = [heard.ids[row] for row in np.flatnonzero(kept)]
    report = {
        "tracks": len(heard),
        "kept": len(ids),
        "splits": {name: Counter(splits)[name] for name in SPLITS},
        "split_by": divided_by,
        "duplicates": dict(Counter(kind for kind, _ in duplicates.values())),
        "suspected_duplicates": _suspects(heard, alike, kept),
        "evaluation": _reported(heard, reasons, references),
    }
    return Selection(
        pa.table({"id": ids, "split": splits}, KEPT), sorted(rejections, key=lambda rejection: rejection.item), report
    )


@dataclass(frozen=True)
class _AudioRows:
    """What is known of the tracks that have a sound, by id. Arrays [N]; texts are coded, -1 stands for an empty one.

    Attributes:
        row: of `sounds`. rank: 0 is the best described. file, pcm: codes of the hashes.
    """

    ids: list[str]
    row: np.ndarray
    rank: np.ndarray
    file: np.ndarray
    pcm: np.ndarray
    hashes: pa.Array
    artist: np.ndarray
    artists: list[str]
    work: np.ndarray
    works: list[str]
    split: np.ndarray  # index in SPLITS

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, tracks: pa.Table, sounds: pa.Table) -> "_AudioRows":
        places = pc.index_in(sounds["id"], tracks["id"].combine_chunks())
        row = np.flatnonzero(places.is_valid().to_numpy())
        row = row[pc.sort_indices(sounds["id"].take(row)).to_numpy()]
        place = places.take(row).to_numpy()
        files, pcms = (sounds[name].take(row).combine_chunks() for name in ("file_sha256", "pcm_sha256"))
        artist, artists = _coded(tracks["artist"].take(place))
        work, works = _coded(tracks["work"].take(place))
        split = pc.index_in(tracks["split"].take(place), pa.array(SPLITS)).fill_null(-1).to_numpy()
        return cls(
            sounds["id"].take(row).to_pylist(), row, _ranks(tracks, place, sounds["seconds"].take(row).to_numpy()),
            _coded(files)[0], _coded(pcms)[0], files, artist, artists, work, works, split,
        )  # fmt: skip


@dataclass(frozen=True)
class _NearDuplicates:
    """Sounds that agree.

    Attributes:
        pairs: rows of tracks. same: which of them are nearly the same recording. bool [P]
        links: pairs that share some sound, [2, L].
        prints: of each row.
        known: of a row, the (number of a reference, reason) of the closest of the references' sounds.
    """

    pairs: Pairs
    same: np.ndarray
    links: np.ndarray
    prints: Sequence[np.ndarray]
    known: dict[int, tuple[int, str]]

    def match(self, a: int, b: int) -> Alignment:
        """How two rows lie best upon each other, by the larger part of the shorter one."""
        return bit_error_rate(self.prints[a], self.prints[b], _enough(self.prints[a], self.prints[b]))


def _coded(texts: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, list[str]]:
    """A code for each text, -1 for an empty one or none, int64 [N]; and the text of each code."""
    whole = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    coded = pc.dictionary_encode(pc.if_else(pc.equal(whole, ""), None, whole))
    return coded.indices.fill_null(-1).to_numpy().astype(np.int64), coded.dictionary.to_pylist()


def _ranks(tracks: pa.Table, place: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The rank of each track, the best described one's is 0. int64 [N]"""
    captioned = pc.greater(pc.list_value_length(tracks["captions"]), 0).fill_null(False).to_numpy()[place]
    described = sum(pc.not_equal(tracks[name], "").fill_null(False).to_numpy().astype(int) for name in _DESCRIBED)
    described = described + pc.greater(pc.list_value_length(tracks["tags"]), 0).fill_null(False).to_numpy()
    licence, licences = _coded(tracks["licence"])
    bound = np.array([_bound(name) for name in licences] + [len(POLICIES)])[licence[place]]  # -1: the last
    order = np.lexsort((np.arange(len(place)), -seconds, bound, -described[place], ~captioned))
    rank = np.empty(len(place), np.int64)
    rank[order] = np.arange(len(place))
    return rank


def _bound(licence: str) -> int:
    """How bound a licence is: 0 under the freest policy."""
    try:
        return next(i for i, policy in enumerate(POLICIES) if allowed(normalise(licence), policy) is None)
    except UserError:
        return len(POLICIES)


def _exact_groups(heard: _AudioRows) -> np.ndarray:
    """The first of those with the same file or samples. int64 [N]"""
    rows = np.arange(len(heard))
    firsts = [_first_of(codes) for codes in (heard.file, heard.pcm)]
    return groups((np.concatenate([rows, rows]), np.concatenate(firsts)), len(heard))


def _first_of(codes: np.ndarray) -> np.ndarray:
    """The first row with the same code, for each; a code of -1 is its own. int64 [N]"""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.where(codes < 0, np.arange(len(codes)), first[inverse])


def _best_of(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The row with the lowest rank of each one's group. int64 [N]"""
    best = np.full(len(group), len(group), np.int64)
    np.minimum.at(best, group, rank)
    row_of = np.empty(len(group), np.int64)
    row_of[rank] = np.arange(len(group))
    return row_of[best[group]]


def _near_duplicates(
    heard: _AudioRows, unique: np.ndarray, prints: list[np.ndarray], references: Sequence[Reference], memory: int,
    folder: Path | None,
) -> _NearDuplicates:
    """What agrees with what, of one sound for each of equal ones, and with the references."""
    outside = [words for reference in references for words in reference.prints]
    owners = [(i, file.name) for i, reference in enumerate(references) if len(reference.prints)
              for file in reference.set.audio]  # fmt: skip
    order = np.concatenate([heard.row[unique], np.arange(len(prints), len(prints) + len(outside))])
    found = near_pairs([*prints, *outside], order, SUSPECT, memory, folder)
    known: dict[int, tuple[int, str]] = {}
    foreign = found.where((found.a < len(unique)) & (found.b >= len(unique)) & (found.rate <= SAME))
    for at in np.argsort(foreign.rate, kind="stable").tolist():
        reference, name = owners[int(foreign.b[at]) - len(unique)]
        reason = f"it sounds like {name} of {references[reference].set.name} ({_agreement(foreign.match(at))})"
        known.setdefault(int(unique[foreign.a[at]]), (reference, reason))
    own = found.where(found.b < len(unique))
    pairs = Pairs(unique[own.a], unique[own.b], own.offset, own.rate, own.overlap)
    by_row = [prints[row] for row in heard.row.tolist()]
    enough = [_enough(by_row[a], by_row[b]) for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)]
    same = (pairs.rate <= SAME) & (pairs.overlap >= np.array(enough, int))
    links = pairs.where(pairs.rate <= SAME)
    return _NearDuplicates(pairs, same, np.stack([links.a, links.b]), by_row, known)


def _enough(a: np.ndarray, b: np.ndarray) -> int:
    """Words that two recordings which are the same must have in common, 1 or more."""
    return max(1, math.ceil(_SHARE * min(np.count_nonzero(a), np.count_nonzero(b))))


def _agreement(match: Alignment) -> str:
    return f"bit error rate {match.rate:.2f} over {match.overlap / RATE:.0f} s"


def _evaluated(
    heard: _AudioRows, exact: np.ndarray, alike: _NearDuplicates, references: Sequence[Reference]
) -> dict[int, tuple[int, str]]:
    """The rows that are in an evaluation set: which one, and why."""
    own = dict(alike.known)
    for number, reference in reversed(list(enumerate(references))):
        for what, codes, texts, names in (
            ("artist", heard.artist, heard.artists, reference.set.artists),
            ("work", heard.work, heard.works, reference.set.works),
        ):
            inside = np.array([text in names for text in texts] + [False])
            for row in np.flatnonzero(inside[codes]).tolist():
                own[row] = (number, f"its {what} {texts[codes[row]]} is in {reference.set.name}")
    if not own:
        return {}
    same = alike.pairs.where(alike.same)
    rows = np.arange(len(heard))
    group = groups((np.concatenate([rows, same.a]), np.concatenate([exact, same.b])), len(heard))
    first = {int(group[row]): row for row in sorted(own, reverse=True)}
    reasons = dict(own)
    for row in np.flatnonzero(np.isin(group, list(first))).tolist():
        if row not in own:
            other = first[int(group[row])]
            number, reason = own[other]
            reasons[row] = (number, f"it is the same recording as {heard.ids[other]}, which is left out: {reason}")
    return reasons | _sharing(heard, exact, alike, reasons)


def _sharing(
    heard: _AudioRows, exact: np.ndarray, alike: _NearDuplicates, reasons: Mapping[int, tuple[int, str]]
) -> dict[int, tuple[int, str]]:
    """The rows, copies too, that have some sound in common with one that is left out: of which set, and why."""
    more: dict[int, tuple[int, str]] = {}
    for out, other in np.concatenate([alike.links, alike.links[::-1]], axis=1).T.tolist():
        if out in reasons and other not in reasons:
            number, reason = reasons[out]
            told = (number, f"it shares some sound with {heard.ids[out]}, which is left out: {reason}")
            more |= {row: told for row in np.flatnonzero(exact == exact[other]).tolist() if row not in more}
    return more


def _duplicates(heard: _AudioRows, best: np.ndarray, alike: _NearDuplicates, usable: np.ndarray) -> dict[int, tuple[str, str]]:
    """The rows that are the same as one that stays: how, and as which. The better described ones are asked first.

    Of many copies of one recording not all pairs were looked at, so each is compared with those that stay so far.
    """
    out: dict[int, tuple[str, str]] = {}
    same = alike.pairs.where(alike.same & usable[alike.pairs.a] & usable[alike.pairs.b])
    group = groups((same.a, same.b), len(heard))
    staying: dict[int, list[int]] = {}
    rows = np.unique(np.concatenate([same.a, same.b]))
    for row in rows[np.argsort(heard.rank[rows])].tolist():
        others = staying.setdefault(int(group[row]), [])
        matches = [(alike.match(row, other), other) for other in others[:_COMPARED]]
        match, other = min(matches, key=lambda pair: pair[0].rate, default=(NONE, -1))
        if match.rate <= SAME:
            words = f"nearly the same sound as {heard.ids[other]} ({_agreement(match)})"
            out[row] = ("nearly the same sound", words)
        else:
            others.append(row)
    for row in np.flatnonzero((best != np.arange(len(best))) & usable).tolist():
        other = int(best[row])
        if heard.file[row] >= 0 and heard.file[row] == heard.file[other]:
            out[row] = ("same file", f"the same file as {heard.ids[other]}")
        else:
            out[row] = ("same sound", f"the same sound as {heard.ids[other]} (only its tags or its format differ)")
    return out


def _suspects(heard: _AudioRows, alike: _NearDuplicates, kept: np.ndarray) -> dict[str, Any]:
    """Kept tracks that agree less than duplicates do, or over a smaller part: for people to listen to."""
    pairs = alike.pairs.where(kept[alike.pairs.a] & kept[alike.pairs.b])
    shown = [
        {"tracks": [heard.ids[pairs.a[at]], heard.ids[pairs.b[at]]], "agreement": _agreement(pairs.match(at))}
        for at in islice(np.argsort(pairs.rate, kind="stable").tolist(), _SHOWN)
    ]
    return {"pairs": len(pairs), "closest": shown}


def _reported(
    heard: _AudioRows, reasons: Mapping[int, tuple[int, str]], references: Sequence[Reference]
) -> list[dict[str, Any]]:
    """For each evaluation set what was left out for it."""
    told: list[dict[str, Any]] = [
        {"name": reference.set.name, "works": len(reference.set.works), "artists": len(reference.set.artists),
         "audio": len(reference.set.audio), "heard": sum(len(words) > 0 for words in reference.prints), "left_out": {}}
        for reference in references
    ]  # fmt: skip
    for row, (number, reason) in sorted(reasons.items()):
        told[number]["left_out"][heard.ids[row]] = reason
    return told


def splits_of(
    keys: Iterable[str], sizes: Mapping[str, int] | None = None, given: Collection[str] = ()
) -> dict[str, str]:
    """The split of each key by `split_by_hash`; where that leaves a split empty, as in a small corpus, a key fills it.

    Train comes first, then valid, then test, as far as there are keys. Train is filled by the largest, the others by
    the smallest; of equal ones the first by hash. What is larger than a twentieth of all trains, unless it fills.

    Args:
        keys: of what goes into one split together.
        sizes: how many tracks each is; None if all are one.
        given: splits that are not empty anyway.
    """
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    size = dict.fromkeys(ranked, 1) if sizes is None else sizes
    large = max(1, sum(size.values()) / 20)
    splits = {key: split_by_hash(key, hash_bytes=4) if size[key] <= large else SPLITS[0] for key in ranked}
    needed = [name for name in SPLITS if name not in given][: len(ranked)]
    counts = Counter(splits.values())
    for name in needed:
        if counts[name] == 0:
            spare = [key for key in ranked if splits[key] not in needed or counts[splits[key]] > 1]
            sign = -1 if name == SPLITS[0] else 1
            unneeded = [key for key in spare if splits[key] not in (*needed, *given)]
            chosen = min(unneeded or spare, key=lambda key: sign * size[key])
            counts.update({splits[chosen]: -1, name: 1})
            splits[chosen] = name
    return splits


def _splits(heard: _AudioRows, kept: np.ndarray, links: np.ndarray) -> tuple[list[str], str]:
    """The split of each kept row, and what was kept together: artists, or recordings where there are too few.

    A split that the source states holds, and draws the artist's other tracks along: to test rather than valid rather
    than train where it states several.
    """
    given = heard.split[kept]
    stated = [SPLITS[code] for code in np.unique(given[given >= 0])]
    wanted = min(len(SPLITS) - len(stated), int(np.sum(given < 0)))
    place = np.full(len(heard), -1)
    place[kept] = np.arange(len(kept))
    of_artist = np.stack([np.arange(len(kept)), _first_of(heard.artist[kept])])
    levels = {"artist": np.concatenate([place[links], of_artist], axis=1), "sound": place[links], "track": links[:, :0]}
    for divided_by, (a, b) in levels.items():  # noqa: B007
        unit = groups((a, b), len(kept))
        drawn = np.full(len(kept), -1)
        np.maximum.at(drawn, unit, given)
        free = drawn[unit] < 0
        if len(np.unique(unit[free])) >= wanted:
            break
    keys = _keys_of(heard, kept, unit, divided_by)
    sizes = Counter(key for key, is_free in zip(keys, free.tolist(), strict=True) if is_free)
    chosen = splits_of(sizes, sizes, stated)
    codes = np.where(given >= 0, given, drawn[unit]).tolist()
    return [SPLITS[code] if code >= 0 else chosen[key] for code, key in zip(codes, keys, strict=True)], divided_by


def _keys_of(heard: _AudioRows, kept: np.ndarray, unit: np.ndarray, divided_by: str) -> list[str]:
    """What each kept row's unit is split by: its first artist, else its first file's hash."""
    artists = heard.artist[kept] if divided_by == "artist" else np.full(len(kept), -1)
    hashes = heard.hashes.take(kept).to_pylist()
    names = [(code < 0, digest if code < 0 else heard.artists[code])
             for code, digest in zip(artists.tolist(), hashes, strict=True)]  # fmt: skip
    first: dict[int, tuple[bool, str]] = {}
    for number, name in zip(unit.tolist(), names, strict=True):
        first[number] = min(first.get(number, name), name)
    return [first[number][1] for number in unit.tolist()]
