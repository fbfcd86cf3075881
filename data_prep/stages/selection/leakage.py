"""Leakage: tracks of the corpus that are in an evaluation set, by work, artist or audio."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.audio.duplicates import groups
from data_prep.sources.evaluation_sets import EvaluationSet
from data_prep.stages.selection.columns import TrackColumns
from data_prep.stages.selection.duplicates import NearDuplicates

Leaks = dict[int, tuple[int, str]]  # by row: index of an evaluation set, reason


def find_leaks(
    columns: TrackColumns, exact: np.ndarray, near: NearDuplicates, evaluation_sets: Sequence[EvaluationSet]
) -> Leaks:
    """The rows that leak an evaluation set: by themselves, as a copy of such a row, or by audio shared with one.

    Args:
        exact: first row with the same file or samples, int64 [N].
    """
    leaks = dict(near.leaks)
    for number, set_ in reversed(list(enumerate(evaluation_sets))):
        for kind, codes, texts, known in (
            ("artist", columns.artist, columns.artists, set_.artists),
            ("work", columns.work, columns.works, set_.works),
        ):
            leaked = np.array([text in known for text in texts] + [False])  # code -1: no text
            for row in np.flatnonzero(leaked[codes]).tolist():
                leaks[row] = (number, f"its {kind} {texts[codes[row]]} is in {set_.name}")
    if not leaks:
        return {}
    leaks |= _copies(columns, exact, near, leaks)
    return leaks | _sharing_audio(columns, exact, near, leaks)


def leak_report(
    columns: TrackColumns, leaks: Mapping[int, tuple[int, str]], evaluation_sets: Sequence[EvaluationSet]
) -> list[dict[str, Any]]:
    """For each evaluation set its size and the tracks excluded for it, as JSON."""
    reports: list[dict[str, Any]] = [
        {
            "name": set_.name,
            "works": len(set_.works),
            "artists": len(set_.artists),
            "audio": len(set_.audio),
            "fingerprinted": sum(len(fingerprint) > 0 for fingerprint in set_.fingerprints),
            "left_out": {},
        }
        for set_ in evaluation_sets
    ]
    for row, (number, reason) in sorted(leaks.items()):
        reports[number]["left_out"][columns.ids[row]] = reason
    return reports


def _copies(columns: TrackColumns, exact: np.ndarray, near: NearDuplicates, leaks: Leaks) -> Leaks:
    same = near.pairs.select(near.same)
    rows = np.arange(len(columns))
    group = groups((np.concatenate([rows, same.a]), np.concatenate([exact, same.b])), len(columns))
    first_leak = {int(group[row]): row for row in sorted(leaks, reverse=True)}  # by group
    copies: Leaks = {}
    for row in np.flatnonzero(np.isin(group, list(first_leak))).tolist():
        if row not in leaks:
            other = first_leak[int(group[row])]
            number, reason = leaks[other]
            copies[row] = (number, f"it is the same recording as {columns.ids[other]}, which is excluded: {reason}")
    return copies


def _sharing_audio(columns: TrackColumns, exact: np.ndarray, near: NearDuplicates, leaks: Leaks) -> Leaks:
    """The rows, and their exact copies, that share audio with a leaking one."""
    more: Leaks = {}
    for leaked, other in np.concatenate([near.links, near.links[::-1]], axis=1).T.tolist():
        if leaked in leaks and other not in leaks:
            number, reason = leaks[leaked]
            why = f"it shares audio with {columns.ids[leaked]}, which is excluded: {reason}"
            for row in np.flatnonzero(exact == exact[other]).tolist():
                more.setdefault(row, (number, why))
    return more
