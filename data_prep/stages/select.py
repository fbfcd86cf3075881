"""The stage `select`: which tracks of all shards are kept, in which split, and the rows of their segments."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.audio.decode import Decoder
from data_prep.shard_task import Counts, ShardResult
from data_prep.sources.evaluation_sets import EvaluationSet
from data_prep.stages.pack import DECONTAMINATION
from data_prep.stages.segments import write_segments
from data_prep.stages.selection.tracks import select_tracks
from data_prep.stages.shard import FINGERPRINTS_FILE, write_fingerprints
from data_prep.tables import write_rejected
from data_prep.track import Rejected, Rejection
from ssmttm.audio.fingerprint import Fingerprinter
from ssmttm.audio.stereo import mix_down
from ssmttm.data.tensorfile import concatenate_on_disk, map_tensors
from ssmttm.files import config_hash

_TRACK_COLUMNS = ("licence", "licence_url", "title", "author", "source_url", "artist", "work", "evidence")


@dataclass(frozen=True)
class DecontaminationSet:
    """An evaluation set to exclude, and the shards that hold the fingerprints of its audio."""

    evaluation_set: EvaluationSet
    shards: tuple[ShardResult, ...]

    @property
    def inputs(self) -> str:
        """A hash of everything that identifies its tracks."""
        works, artists = sorted(self.evaluation_set.works), sorted(self.evaluation_set.artists)
        return config_hash({"works": works, "artists": artists, "audio": [shard.outputs for shard in self.shards]})


def fingerprint_files(files: Sequence[Path], folder: Path) -> Counts:
    """Write the fingerprints of an evaluation set's audio files, in order; empty for a file that cannot be decoded."""
    fingerprints: list[np.ndarray] = []
    rejected: list[Rejection] = []
    with Decoder() as decoder:
        for file in files:
            try:
                fingerprints.append(_fingerprint(decoder, file))
            except Rejected as error:
                fingerprints.append(np.empty(0, np.uint32))
                rejected.append(error.for_item(file.name))
    write_fingerprints(folder, fingerprints)
    write_rejected(folder, "reference", rejected)
    return {"tracks": len(files), "rejected": len(rejected)}


def select_shards(
    shards: Sequence[Path], decontamination: Sequence[DecontaminationSet], modifications: str, folder: Path
) -> Counts:
    """Select among the tracks of all shards, and write the rows of their segments, one folder per shard."""
    tracks = pa.concat_tables(pq.read_table(shard / "tracks.parquet") for shard in shards)
    recordings = pa.concat_tables(pq.read_table(shard / "recordings.parquet") for shard in shards)
    with ExitStack() as stack:

        def fingerprints(folders: Sequence[Path]) -> list[np.ndarray]:
            return _map_fingerprints(folders, stack.enter_context(TemporaryFile(dir=folder)))

        evaluation_sets = [
            replace(excluded.evaluation_set, fingerprints=fingerprints([shard.folder for shard in excluded.shards]))
            for excluded in decontamination
        ]
        selection = select_tracks(tracks, recordings, fingerprints(shards), evaluation_sets, folder=folder)
    split_of = dict(zip(selection.kept["id"].to_pylist(), selection.kept["split"].to_pylist(), strict=True))
    counts: Counts = {"tracks": len(split_of), "segments": 0, "rejected": len(selection.rejections)}
    for shard in shards:
        rows = list(_rows(shard, split_of, modifications))
        (folder / shard.name).mkdir()
        write_segments(folder / shard.name, rows)
        counts["segments"] += len(rows)
    write_rejected(folder, "select", selection.rejections)
    (folder / DECONTAMINATION).write_text(json.dumps(selection.report, indent=1, ensure_ascii=False) + "\n")
    return counts


def _rows(shard: Path, split_of: dict[str, str], modifications: str) -> Iterator[dict[str, Any]]:
    """Manifest rows for the segments of a shard's kept tracks."""
    tracks = {track["id"]: track for track in pq.read_table(shard / "tracks.parquet").to_pylist()}
    for segment in pq.read_table(shard / "segments.parquet").to_pylist():
        track = tracks[segment["track"]]
        if track["id"] not in split_of:
            continue
        texts = {name: track[name] if segment[name] is None else segment[name] for name in ("captions", "tags")}
        yield {
            **segment,
            **texts,
            **{name: track[name] for name in _TRACK_COLUMNS},
            "split": split_of[track["id"]],
            "modifications": modifications,
            "shard": -1,
            "offset": 0,
            "frames": 0,
        }


def _fingerprint(decoder: Decoder, file: Path) -> np.ndarray:
    fingerprinter = None
    for block, rate in decoder.blocks(file):
        fingerprinter = fingerprinter or Fingerprinter(rate)
        fingerprinter.add(mix_down(block))
    return np.empty(0, np.uint32) if fingerprinter is None else fingerprinter.finish()


def _map_fingerprints(folders: Sequence[Path], spool: BinaryIO) -> list[np.ndarray]:
    """The fingerprint, uint32 [T], of every recording of the folders, memory-mapped."""
    offsets = [np.array(map_tensors(folder / FINGERPRINTS_FILE)["offsets"]) for folder in folders]
    words = concatenate_on_disk((map_tensors(folder / FINGERPRINTS_FILE)["words"] for folder in folders), spool)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *map(np.diff, offsets)])).tolist()
    return [words[first:end] for first, end in pairwise(ends)]
