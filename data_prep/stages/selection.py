"""The stage `select`: of all tracks together, which stay and in which split; and each shard's segments that follow."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.audio.decode import Decoder
from data_prep.shard_task import Counts, ShardResult
from data_prep.sources.references import References
from data_prep.stages.pack import DECONTAMINATION
from data_prep.stages.segments import ROWS_FILE
from data_prep.stages.select import Reference, select
from data_prep.stages.shard import FINGERPRINTS_FILE
from data_prep.tables import write_rejected
from data_prep.track import Rejected, Rejection
from ssmttm.audio.fingerprint import Fingerprinter
from ssmttm.data.store import SCHEMA
from ssmttm.data.tensorfile import concatenate_on_disk, map_tensors, write_tensors
from ssmttm.files import config_hash

_TRACK_COLUMNS = ("licence", "licence_url", "title", "author", "source_url", "artist", "work", "evidence")


@dataclass(frozen=True)
class Decontamination:
    """An evaluation set that is kept out, and the shards that hold its audio's fingerprints."""

    references: References
    shards: tuple[ShardResult, ...]

    @property
    def inputs(self) -> str:
        """A hash of all that is kept out by it."""
        works, artists = sorted(self.references.works), sorted(self.references.artists)
        return config_hash({"works": works, "artists": artists, "sound": [shard.outputs for shard in self.shards]})


def fingerprint_files(files: Sequence[Path], folder: Path) -> Counts:
    """Write the fingerprints of an evaluation set's audio files, in their order; what cannot be read has none."""
    words: list[np.ndarray] = []
    rejected: list[Rejection] = []
    with Decoder() as decoder:
        for file in files:
            try:
                words.append(_fingerprint(decoder, file))
            except Rejected as rejection:
                words.append(np.empty(0, np.uint32))
                rejected.append(rejection.of(file.name))
    offsets = np.cumsum([0, *map(len, words)], dtype=np.int64)
    joined = np.concatenate([np.empty(0, np.uint32), *words])
    write_tensors(folder / FINGERPRINTS_FILE, {"words": joined, "offsets": offsets})
    write_rejected(folder, "reference", rejected)
    return {"tracks": len(files), "rejected": len(rejected)}


def select_shards(shards: Sequence[Path], against: Sequence[Decontamination], modifications: str, folder: Path) -> Counts:
    """Choose among the tracks of all shards, and write the rows of their segments, one folder a shard."""
    tracks, sounds = (pa.concat_tables(pq.read_table(shard / f"{name}.parquet") for shard in shards)
                      for name in ("tracks", "sounds"))  # fmt: skip
    with ExitStack() as spools:

        def prints(folders: Sequence[Path]) -> list[np.ndarray]:
            return _fingerprints(folders, spools.enter_context(TemporaryFile(dir=folder)))

        references = [Reference(set_.references, prints([shard.folder for shard in set_.shards])) for set_ in against]
        selection = select(tracks, sounds, prints(shards), references, folder=folder)
    kept = dict(zip(selection.kept["id"].to_pylist(), selection.kept["split"].to_pylist(), strict=True))
    counts = {"tracks": len(kept), "segments": 0, "rejected": len(selection.rejections)}
    for shard in shards:
        rows = list(_rows(shard, kept, modifications))
        (folder / shard.name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / shard.name / ROWS_FILE)
        counts["segments"] += len(rows)
    write_rejected(folder, "select", selection.rejections)
    (folder / DECONTAMINATION).write_text(json.dumps(selection.report, indent=1, ensure_ascii=False) + "\n")
    return counts


def _rows(shard: Path, kept: dict[str, str], modifications: str) -> Iterator[dict[str, Any]]:
    """A store's rows for a shard's segments of the kept tracks."""
    tracks = {track["id"]: track for track in pq.read_table(shard / "tracks.parquet").to_pylist()}
    for segment in pq.read_table(shard / "segments.parquet").to_pylist():
        track = tracks[segment["track"]]
        if track["id"] not in kept:
            continue
        texts = {name: track[name] if segment[name] is None else segment[name] for name in ("captions", "tags")}
        yield {
            **segment,
            **texts,
            **{name: track[name] for name in _TRACK_COLUMNS},
            "split": kept[track["id"]],
            "modifications": modifications,
            "shard": -1,
            "offset": 0,
            "frames": 0,
        }


def _fingerprint(decoder: Decoder, file: Path) -> np.ndarray:
    fingerprinter = None
    for block, rate in decoder.blocks(file):
        fingerprinter = fingerprinter or Fingerprinter(rate)
        fingerprinter.add(block.mean(axis=0))
    return np.empty(0, np.uint32) if fingerprinter is None else fingerprinter.finish()


def _fingerprints(folders: Sequence[Path], spool: BinaryIO) -> list[np.ndarray]:
    """The fingerprint, uint32 [n], of every track of folders, memory-mapped."""
    offsets = [np.array(map_tensors(folder / FINGERPRINTS_FILE)["offsets"]) for folder in folders]
    words = concatenate_on_disk((map_tensors(folder / FINGERPRINTS_FILE)["words"] for folder in folders), spool)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *map(np.diff, offsets)])).tolist()
    return [words[first:end] for first, end in pairwise(ends)]
