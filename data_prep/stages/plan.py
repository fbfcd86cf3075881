"""The plan: a source's tracks, those with a usable licence, spread over shards by the hash of their id.

A shard's number depends on the track's id and on how many tracks there are to the next power of two, so a corpus that
grows a little has few shards made anew.
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
from data_prep.tables import TRACKS, printable, write_rejected
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError
from ssmttm.files import config_hash
from ssmttm.licences import Licence, allowed, normalise

TRACKS_FILE, SHARDS_FILE = "tracks.arrow", "shards.json"
_TRACKS = (4, 32)  # of a shard, on average: the fewest and the most
_SHARDS = 64  # that are aimed at in between: work for many, and little to do again after a stop
_BATCH = 8192
_FIELDS = [field.name for field in fields(Track)]
_PLANNED = TRACKS.append(pa.field("shard", pa.int64()))


def write_plan(found: Iterable[Track | Rejection], root: Path, licence: str | None, policy: str, folder: Path) -> Counts:
    """Write the tracks that may come in as one Arrow batch a shard, and the others to the quarantine.

    Args:
        found: what a source yields.
        root: the folder that the tracks' paths start from.
        licence: of tracks whose source names none; None refuses those.
        policy: a key of `ssmttm.licences.POLICIES`.

    Raises:
        UserError: `licence` is not known.
    """
    fallback = normalise(licence) if licence else None
    rejected: list[Rejection] = []
    table = pa.Table.from_batches(_batches(_usable(found, fallback, policy, rejected)), _PLANNED)
    bits = _bits(table.num_rows)
    table = _with_shards(table, bits)
    shards = []
    with pa.OSFile(str(folder / TRACKS_FILE), "wb") as file, pa.ipc.new_file(file, TRACKS) as writer:
        for number, batch in _split(table):
            writer.write_batch(batch)
            shards.append((f"{number:05d}-of-{2**bits:05d}", _inputs_of(batch.to_pylist(), root)))
    (folder / SHARDS_FILE).write_text(json.dumps(shards))
    write_rejected(folder, "plan", rejected)
    return {"tracks": table.num_rows, "rejected": len(rejected)}


def shards_of(folder: Path) -> list[tuple[str, str]]:
    """For each shard of a plan its name, and a hash of its tracks and of size and time of their files."""
    return [(key, inputs) for key, inputs in json.loads((folder / SHARDS_FILE).read_text())]


def read_shard(folder: Path, index: int) -> list[dict[str, Any]]:
    """The tracks of one shard, as rows of TRACKS."""
    with pa.memory_map(str(folder / TRACKS_FILE)) as file:
        return pa.ipc.open_file(file).get_batch(index).to_pylist()


def _inputs_of(tracks: list[dict[str, Any]], root: Path) -> str:
    return config_hash({"tracks": tracks, "files": [_stamp(root, track["path"]) for track in tracks]})


def _stamp(root: Path, path: str) -> list[int] | None:
    try:
        facts = (root / path).stat()
    except (OSError, ValueError):
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _usable(
    found: Iterable[Track | Rejection], fallback: Licence | None, policy: str, rejected: list[Rejection]
) -> Iterator[dict[str, Any]]:
    """Rows of the tracks that may come in; the others are added to `refused`."""
    seen: set[bytes] = set()
    for item in found:
        if isinstance(item, Rejection):
            rejected.append(item)
            continue
        key = hashlib.sha256(item.id.encode("utf-8", "surrogatepass")).digest()[:16]
        try:
            if printable(item.path) != item.path:
                raise Rejected("metadata", "its name is not UTF-8: rename it")
            if key in seen:
                raise Rejected("metadata", "its id stands for another track already")
            licence = _licence(item.licence, fallback, policy)
        except Rejected as rejection:
            rejected.append(rejection.of(item.id))
            continue
        seen.add(key)
        row = {name: _clean(getattr(item, name)) for name in _FIELDS}
        row |= {"licence": licence.spdx, "licence_url": licence.url}
        yield row | {"shard": int.from_bytes(key[:4], "big")}


def _clean(value: str | tuple[str, ...]) -> str | list[str]:
    return printable(value) if isinstance(value, str) else [printable(text) for text in value]


def _licence(stated: str, fallback: Licence | None, policy: str) -> Licence:
    if not stated and fallback is None:
        raise Rejected("licence", "no licence: name one in the metadata, or give --licence for tracks without one")
    licence = _normalised(stated) if stated else fallback
    if not isinstance(licence, Licence):
        raise Rejected("licence", str(licence))
    reason = allowed(licence, policy)
    if reason:
        raise Rejected("licence", reason)
    return licence


@lru_cache(maxsize=4096)
def _normalised(stated: str) -> Licence | str:
    """The licence, or why there is none."""
    try:
        return normalise(stated)
    except UserError as error:
        return str(error)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    held: list[dict[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == _BATCH:
            yield pa.RecordBatch.from_pylist(held, schema=_PLANNED)
            held.clear()
    yield pa.RecordBatch.from_pylist(held, schema=_PLANNED)


def _bits(tracks: int) -> int:
    """The logarithm of how many shards there are."""
    fewest, most = (max(1, tracks) / size for size in reversed(_TRACKS))
    return max(0, math.ceil(math.log2(min(most, max(fewest, _SHARDS)))))


def _with_shards(table: pa.Table, bits: int) -> pa.Table:
    """Sorted by shard, which is the first `bits` bits of the id's hash, and id."""
    shards = pc.shift_right(table["shard"], pa.scalar(32 - bits, pa.int64()))
    table = table.set_column(table.column_names.index("shard"), "shard", shards)
    return table.sort_by([("shard", "ascending"), ("id", "ascending")])


def _split(table: pa.Table) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Number and tracks of each shard that has any."""
    shards = table["shard"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
    for first, end in pairwise(edges):
        if end > first:
            rows = table.select(TRACKS.names).slice(first, end - first).combine_chunks()
            yield int(shards[first]), rows.to_batches()[0]
