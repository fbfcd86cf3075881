"""Which tracks make the corpus, and in which split: a function of metadata, hashes and fingerprints alone.

The order of the rows has no effect. In order:

1. Duplicates are found: same file, same samples, matching fingerprints (also a clip of a longer recording).
2. Tracks in an evaluation set by work, artist or audio are excluded, with their copies and with tracks that share
   audio with them.
3. Of several copies the best described is kept: with captions, more metadata, a freer licence, longer, first by id. A
   track is rejected as a duplicate only of a track that is kept.
4. Splits: as the source states, else by artist, else by recording.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.sources.evaluation_sets import EvaluationSet
from data_prep.stages.selection.columns import TrackColumns
from data_prep.stages.selection.duplicates import (
    best_of_group,
    exact_groups,
    find_duplicates,
    find_near_duplicates,
    suspected_duplicates,
)
from data_prep.stages.selection.leakage import find_leaks, leak_report
from data_prep.stages.selection.splits import split_tracks
from data_prep.track import Rejection
from ssmttm.data.splits import SPLITS

KEPT = pa.schema({"id": pa.string(), "split": pa.string()})


@dataclass(frozen=True)
class Selection:
    """The outcome."""

    kept: pa.Table  # id and split of each kept track, by id
    rejections: list[Rejection]  # of all other tracks with audio, by id
    report: dict[str, Any]  # counts and reasons, for JSON


def select_tracks(
    tracks: pa.Table,
    recordings: pa.Table,
    fingerprints: Iterable[np.ndarray],
    evaluation_sets: Sequence[EvaluationSet] = (),
    memory: int = 1 << 30,
    folder: Path | None = None,
) -> Selection:
    """Select tracks.

    Args:
        tracks, recordings: `data_prep.tables.TRACKS` and RECORDINGS, each id once. Tracks without a recording are
            ignored.
        fingerprints: of each row of `recordings`, uint32 [T]; they may be memory-mapped.
        evaluation_sets: sets to exclude, with their fingerprints.
        memory, folder: as for `data_prep.audio.duplicates.near_pairs`.
    """
    columns = TrackColumns.from_tables(tracks, recordings)
    exact = exact_groups(columns)
    best = best_of_group(exact, columns.rank)
    unique = np.flatnonzero(best == np.arange(len(best)))
    near = find_near_duplicates(columns, unique, list(fingerprints), evaluation_sets, memory, folder)
    leaks = find_leaks(columns, exact, near, evaluation_sets)
    kept = ~np.isin(np.arange(len(columns)), list(leaks))
    duplicates = find_duplicates(columns, best, near, kept)
    kept[list(duplicates)] = False
    kept_rows = np.flatnonzero(kept)
    links = near.links[:, kept[near.links].all(axis=0)]
    splits, split_by = split_tracks(columns, kept_rows, links)

    rejections = [Rejection(columns.ids[row], "evaluation", reason) for row, (_, reason) in leaks.items()]
    rejections += [Rejection(columns.ids[row], "duplicate", f"it is {why}") for row, (_, why) in duplicates.items()]
    ids = [columns.ids[row] for row in kept_rows]
    report = {
        "tracks": len(columns),
        "kept": len(ids),
        "splits": {name: splits.count(name) for name in SPLITS},
        "split_by": split_by,
        "duplicates": dict(Counter(kind for kind, _ in duplicates.values())),
        "suspected_duplicates": suspected_duplicates(columns, near, kept),
        "evaluation": leak_report(columns, leaks, evaluation_sets),
    }
    rejections.sort(key=lambda rejection: rejection.item)
    return Selection(pa.table({"id": ids, "split": splits}, KEPT), rejections, report)
