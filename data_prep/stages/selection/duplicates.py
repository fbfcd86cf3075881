"""Duplicates among tracks: the same file, the same samples, matching fingerprints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.audio.duplicates import SAME, SUSPECT, Pairs, groups, near_pairs
from data_prep.sources.evaluation_sets import EvaluationSet
from data_prep.stages.selection.columns import TrackColumns, first_with_code
from ssmttm.audio.fingerprint import NONE, RATE, Alignment, bit_error_rate

_MIN_OVERLAP = 0.8  # fraction of the shorter recording that must match
_MAX_COMPARED = 16  # kept copies of one recording that a track is compared with
_SHOWN = 100  # suspected pairs in the report


@dataclass(frozen=True)
class NearDuplicates:
    """Recordings with matching fingerprints."""

    pairs: Pairs  # of track rows [P]
    same: np.ndarray  # which pairs are the same recording, bool [P]
    links: np.ndarray  # pairs that share audio, int64 [2, L]
    fingerprints: Sequence[np.ndarray]  # of each track row
    leaks: dict[int, tuple[int, str]]  # by row: index of an evaluation set, reason; of the closest match in its audio

    def align(self, a: int, b: int) -> Alignment:
        """The best alignment of two rows over enough of the shorter one."""
        one, other = self.fingerprints[a], self.fingerprints[b]
        return bit_error_rate(one, other, _min_overlap(one, other))


def exact_groups(columns: TrackColumns) -> np.ndarray:
    """For each row the first row with the same file or samples. int64 [N]"""
    rows = np.arange(len(columns))
    firsts = [first_with_code(codes) for codes in (columns.file, columns.pcm)]
    return groups((np.concatenate([rows, rows]), np.concatenate(firsts)), len(columns))


def best_of_group(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The row of lowest rank in the group of each row. int64 [N]"""
    best = np.full(len(group), len(group), np.int64)
    np.minimum.at(best, group, rank)
    row_of_rank = np.empty(len(group), np.int64)
    row_of_rank[rank] = np.arange(len(group))
    return row_of_rank[best[group]]


def find_near_duplicates(
    columns: TrackColumns,
    unique: np.ndarray,
    fingerprints: list[np.ndarray],
    evaluation_sets: Sequence[EvaluationSet],
    memory: int,
    folder: Path | None,
) -> NearDuplicates:
    """Compare the fingerprints of the rows `unique` with each other and with the evaluation sets."""
    evaluation_prints = [print_ for set_ in evaluation_sets for print_ in set_.fingerprints]
    owners = [(number, file.name) for number, set_ in enumerate(evaluation_sets) if set_.fingerprints
              for file in set_.audio]  # fmt: skip
    order = np.concatenate([columns.row[unique], len(fingerprints) + np.arange(len(evaluation_prints))])
    found = near_pairs([*fingerprints, *evaluation_prints], order, SUSPECT, memory, folder)

    leaks: dict[int, tuple[int, str]] = {}
    crossing = found.select((found.a < len(unique)) & (found.b >= len(unique)) & (found.rate <= SAME))
    for index in np.argsort(crossing.rate, kind="stable").tolist():
        number, name = owners[int(crossing.b[index]) - len(unique)]
        match = describe_match(crossing.match(index))
        reason = f"its audio matches {name} of {evaluation_sets[number].name} ({match})"
        leaks.setdefault(int(unique[crossing.a[index]]), (number, reason))

    inner = found.select(found.b < len(unique))
    pairs = Pairs(unique[inner.a], unique[inner.b], inner.offset, inner.rate, inner.overlap)
    by_row = [fingerprints[row] for row in columns.row.tolist()]
    needed = [_min_overlap(by_row[a], by_row[b]) for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)]
    same = (pairs.rate <= SAME) & (pairs.overlap >= np.array(needed, int))
    sharing = pairs.select(pairs.rate <= SAME)
    return NearDuplicates(pairs, same, np.stack([sharing.a, sharing.b]), by_row, leaks)


def find_duplicates(
    columns: TrackColumns, best: np.ndarray, near: NearDuplicates, usable: np.ndarray
) -> dict[int, tuple[str, str]]:
    """The usable rows that duplicate a kept one, with (kind, reason); the best described rows are decided first.

    Not all pairs of many copies were compared, so each row is compared with the copies kept so far.
    """
    duplicates: dict[int, tuple[str, str]] = {}
    same = near.pairs.select(near.same & usable[near.pairs.a] & usable[near.pairs.b])
    group = groups((same.a, same.b), len(columns))
    kept: dict[int, list[int]] = {}  # by group
    rows = np.unique(np.concatenate([same.a, same.b]))
    for row in rows[np.argsort(columns.rank[rows])].tolist():
        copies = kept.setdefault(int(group[row]), [])
        matches = [(near.align(row, other), other) for other in copies[:_MAX_COMPARED]]
        match, other = min(matches, key=lambda pair: pair[0].rate, default=(NONE, -1))
        if match.rate <= SAME:
            reason = f"a near-duplicate of {columns.ids[other]} ({describe_match(match)})"
            duplicates[row] = ("near-duplicate", reason)
        else:
            copies.append(row)
    for row in np.flatnonzero((best != np.arange(len(best))) & usable).tolist():
        other = int(best[row])
        if columns.file[row] >= 0 and columns.file[row] == columns.file[other]:
            duplicates[row] = ("same file", f"the same file as {columns.ids[other]}")
        else:
            reason = f"the same samples as {columns.ids[other]} (only tags or format differ)"
            duplicates[row] = ("same samples", reason)
    return duplicates


def suspected_duplicates(columns: TrackColumns, near: NearDuplicates, kept: np.ndarray) -> dict[str, Any]:
    """The kept pairs that match less well, or over a smaller part, than duplicates: to be checked by listening."""
    pairs = near.pairs.select(kept[near.pairs.a] & kept[near.pairs.b])
    closest = [
        {
            "tracks": [columns.ids[pairs.a[index]], columns.ids[pairs.b[index]]],
            "agreement": describe_match(pairs.match(index)),
        }
        for index in islice(np.argsort(pairs.rate, kind="stable").tolist(), _SHOWN)
    ]
    return {"pairs": len(pairs), "closest": closest}


def describe_match(match: Alignment) -> str:
    """Error rate and length of a match, for a reason."""
    return f"bit error rate {match.rate:.2f} over {match.overlap / RATE:.0f} s"


def _min_overlap(a: np.ndarray, b: np.ndarray) -> int:
    """Words that must overlap for two fingerprints to be of the same recording, 1 or more."""
    return max(1, math.ceil(_MIN_OVERLAP * min(np.count_nonzero(a), np.count_nonzero(b))))
