"""The stage `plan`: the tracks of a source with an allowed licence, distributed over shards by the hash of their id.

The number of shards is a power of two, so that few shards change when a corpus grows a little.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.shard_task import Counts
from data_prep.tables import TRACKS, utf8, write_rejected
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError
from ssmttm.files import config_hash
from ssmttm.licences import Licence, allowed, normalise

TRACKS_FILE, SHARDS_FILE = "tracks.arrow", "shards.json"
_MIN_TRACKS, _MAX_TRACKS = 4, 32  # per shard, on average
_SHARDS = 64  # preferred number: enough for many workers, and little is lost when one is stopped
_BATCH = 8192
_FIELDS = [field.name for field in fields(Track)]
_PLANNED = TRACKS.append(pa.field("shard", pa.int64()))


def write_plan(
    items: Iterable[Track | Rejection], root: Path, licence: str | None, policy: str, folder: Path
) -> Counts:
    """Write the allowed items of a source as Arrow batches, one per shard, and the rejected ones.

    Args:
        root: folder that the tracks' paths are relative to.
        licence: of tracks whose source states none; None rejects them.
        policy: a key of `ssmttm.licences.POLICIES`.
    """
    fallback = normalise(licence) if licence else None
    rejected: list[Rejection] = []
    table = pa.Table.from_batches(_batches(_planned_rows(items, fallback, policy, rejected)), _PLANNED)
    bits = _shard_bits(table.num_rows)
    table = _with_shards(table, bits)
    shards = []
    with pa.OSFile(str(folder / TRACKS_FILE), "wb") as file, pa.ipc.new_file(file, TRACKS) as writer:
        for number, batch in _split(table):
            writer.write_batch(batch)
            tracks = batch.to_pylist()
            files = [file_stamp(root / track["path"]) for track in tracks]
            shards.append((f"{number:05d}-of-{2**bits:05d}", config_hash({"tracks": tracks, "files": files})))
    (folder / SHARDS_FILE).write_text(json.dumps(shards))
    write_rejected(folder, "plan", rejected)
    return {"tracks": table.num_rows, "rejected": len(rejected)}


def planned_shards(folder: Path) -> list[tuple[str, str]]:
    """The shards of a plan: name, and a hash of the tracks and of the size and time of their files."""
    return [(key, inputs) for key, inputs in json.loads((folder / SHARDS_FILE).read_text())]


def read_shard(folder: Path, index: int) -> list[dict[str, Any]]:
    """The tracks of a shard, as rows of TRACKS."""
    with pa.memory_map(str(folder / TRACKS_FILE)) as file:
        return pa.ipc.open_file(file).get_batch(index).to_pylist()


def file_stamp(file: Path) -> list[int] | None:
    """Size and time of a file, to notice changes; None if it does not exist."""
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _planned_rows(
    items: Iterable[Track | Rejection], fallback: Licence | None, policy: str, rejected: list[Rejection]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of allowed tracks; append the others to `rejected`."""
    known: set[bytes] = set()
    for item in items:
        if isinstance(item, Rejection):
            rejected.append(item)
            continue
        key = hashlib.sha256(item.id.encode("utf-8", "surrogatepass")).digest()[:16]
        try:
            if utf8(item.path) != item.path:
                raise Rejected("metadata", "its name is not UTF-8: rename it")
            if key in known:
                raise Rejected("metadata", "another track has the same id")
            licence = _licence(item.licence, fallback, policy)
        except Rejected as error:
            rejected.append(error.for_item(item.id))
            continue
        known.add(key)
        row = {name: _clean(getattr(item, name)) for name in _FIELDS}
        row |= {"licence": licence.spdx, "licence_url": licence.url}
        yield row | {"shard": int.from_bytes(key[:4], "big")}


def _clean(value: str | tuple[str, ...]) -> str | list[str]:
    return utf8(value) if isinstance(value, str) else [utf8(text) for text in value]


def _licence(stated: str, fallback: Licence | None, policy: str) -> Licence:
    if not stated and fallback is None:
        raise Rejected("licence", "no licence: state one in the metadata, or give --licence for tracks without one")
    licence = _normalised(stated) if stated else fallback
    if not isinstance(licence, Licence):
        raise Rejected("licence", str(licence))
    reason = allowed(licence, policy)
    if reason:
        raise Rejected("licence", reason)
    return licence


@lru_cache(maxsize=4096)
def _normalised(stated: str) -> Licence | str:
    """The licence, or why it is not accepted."""
    try:
        return normalise(stated)
    except UserError as error:
        return str(error)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield pa.RecordBatch.from_pylist(batch, schema=_PLANNED)
            batch.clear()
    yield pa.RecordBatch.from_pylist(batch, schema=_PLANNED)


def _shard_bits(n_tracks: int) -> int:
    """Log2 of the number of shards."""
    fewest, most = (max(1, n_tracks) / size for size in (_MAX_TRACKS, _MIN_TRACKS))
    return max(0, math.ceil(math.log2(min(most, max(fewest, _SHARDS)))))


def _with_shards(table: pa.Table, bits: int) -> pa.Table:
    """Sort by shard, the first `bits` bits of the id's hash, and id."""
    shards = pc.shift_right(table["shard"], pa.scalar(32 - bits, pa.int64()))
    table = table.set_column(table.column_names.index("shard"), "shard", shards)
    return table.sort_by([("shard", "ascending"), ("id", "ascending")])


def _split(table: pa.Table) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Number and tracks of each shard that has tracks."""
    shards = table["shard"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
    for first, end in pairwise(edges):
        if end > first:
            rows = table.select(TRACKS.names).slice(first, end - first).combine_chunks()
            yield int(shards[first]), rows.to_batches()[0]
