"""What the first stage of every source leaves of a shard, for the selection: tracks, sounds, segments, fingerprints.

A shard's folder holds tracks.parquet, sounds.parquet and segments.parquet (schemas in `data_prep.tables`),
audio/*.flac, fingerprints.safetensors and quarantine.parquet.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_task import Counts
from data_prep.tables import SEGMENTS, SOUNDS, TRACKS, write_rejected, write_rows
from data_prep.track import Rejection
from ssmttm.data.tensorfile import write_tensors

FINGERPRINTS_FILE = "fingerprints.safetensors"
Row = dict[str, Any]


@dataclass
class Shard:
    """What a shard collects; `write` makes its folder."""

    tracks: list[Row] = field(default_factory=list)
    sounds: list[Row] = field(default_factory=list)
    segments: list[Row] = field(default_factory=list)
    words: list[np.ndarray] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)

    def write(self, folder: Path, stage: str) -> Counts:
        """Write the tables and the fingerprints; gives the counts."""
        write_rows(folder / "tracks.parquet", self.tracks, TRACKS)
        write_rows(folder / "sounds.parquet", self.sounds, SOUNDS)
        write_rows(folder / "segments.parquet", self.segments, SEGMENTS)
        offsets = np.cumsum([0, *map(len, self.words)], dtype=np.int64)  # [tracks + 1]
        words = np.concatenate([np.empty(0, np.uint32), *self.words])
        write_tensors(folder / FINGERPRINTS_FILE, {"words": words, "offsets": offsets})
        write_rejected(folder, stage, self.rejected)
        return {
            "tracks": len(self.tracks),
            "segments": len(self.segments),
            "rejected": len(self.rejected),
            "seconds": sum(sound["seconds"] for sound in self.sounds),
        }
