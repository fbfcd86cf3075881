"""A shard of tracks as the stages `cut` and `render` write it, for the stage `select`.

The folder holds tracks.parquet, recordings.parquet and segments.parquet (schemas in `data_prep.tables`), audio/*.flac,
fingerprints.safetensors and rejected.parquet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_task import Counts
from data_prep.stages.segments import channels_of
from data_prep.tables import RECORDINGS, TRACKS, segments_schema, write_rejected, write_rows
from data_prep.track import Rejection
from ssmttm.data.tensorfile import write_tensors

FINGERPRINTS_FILE = "fingerprints.safetensors"
Row = dict[str, Any]


@dataclass
class Shard:
    """The rows of a shard, collected track by track."""

    tracks: list[Row] = field(default_factory=list)
    recordings: list[Row] = field(default_factory=list)
    segments: list[Row] = field(default_factory=list)
    fingerprints: list[np.ndarray] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)

    def write(self, folder: Path, stage: str) -> Counts:
        """Write the tables and the fingerprints."""
        write_rows(folder / "tracks.parquet", self.tracks, TRACKS)
        write_rows(folder / "recordings.parquet", self.recordings, RECORDINGS)
        write_rows(folder / "segments.parquet", self.segments, segments_schema(channels_of(self.segments)))
        write_fingerprints(folder, self.fingerprints)
        write_rejected(folder, stage, self.rejected)
        return {
            "tracks": len(self.tracks),
            "segments": len(self.segments),
            "rejected": len(self.rejected),
            "seconds": sum(recording["seconds"] for recording in self.recordings),
        }


def write_fingerprints(folder: Path, fingerprints: Sequence[np.ndarray]) -> None:
    """Write fingerprints, uint32 [T] each, as one array `words` with `offsets` [n + 1]."""
    offsets = np.cumsum([0, *map(len, fingerprints)], dtype=np.int64)
    words = np.concatenate([np.empty(0, np.uint32), *fingerprints])
    write_tensors(folder / FINGERPRINTS_FILE, {"words": words, "offsets": offsets})
