"""Arrow schemas of the tables that the stages pass on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.track import Rejection
from ssmttm.data.store import STEREO_COLUMNS

_TEXT, _TEXTS, _NUMBER = pa.string(), pa.list_(pa.string()), pa.float64()
_TRACK_TEXTS = (
    "id", "path", "licence", "licence_url", "title", "author", "source_url", "artist", "work", "evidence", "truth"
)  # fmt: skip

TRACKS = pa.schema(
    [*((name, _TEXT) for name in _TRACK_TEXTS), ("captions", _TEXTS), ("tags", _TEXTS), ("split", _TEXT)]
)
# Ids are those of the tracks; pcm_sha256 is of the decoded samples, which do not depend on the file's tags.
RECORDINGS = pa.schema([("id", _TEXT), ("file_sha256", _TEXT), ("pcm_sha256", _TEXT), ("seconds", _NUMBER)])
SEGMENTS = pa.schema(
    [
        ("id", _TEXT),
        ("track", _TEXT),
        ("start", _NUMBER),  # of the segment in the track, seconds
        ("track_duration", _NUMBER),  # seconds
        ("duration", _NUMBER),  # seconds
        ("audio", _TEXT),  # file name in the shard's folder
        ("content_hash", _TEXT),  # sha256 of the 16-bit samples
        ("loudness", _NUMBER),  # LUFS
        ("truth", _TEXT),  # ground-truth annotations as JSON, or null
        ("captions", _TEXTS),  # null: those of the track
        ("tags", _TEXTS),  # null: those of the track
    ]
)


def segments_schema(channels: int) -> pa.Schema:
    """The columns of segments of 1 or 2 channels."""
    return SEGMENTS if channels == 1 else pa.schema([*SEGMENTS, *STEREO_COLUMNS])


REJECTED_FILE = "rejected.parquet"
REJECTED = pa.schema([("item", _TEXT), ("stage", _TEXT), ("kind", _TEXT), ("reason", _TEXT)])


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as a Parquet table."""
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_rejected(folder: Path, stage: str, rejected: list[Rejection]) -> None:
    """Write the rejections of a stage on a shard, sorted."""
    rows = [{"stage": stage, **asdict(rejection)} for rejection in rejected]
    rows = [{name: utf8(value) for name, value in row.items()} for row in rows]
    rows.sort(key=lambda row: (row["item"], row["kind"], row["reason"]))
    write_rows(folder / REJECTED_FILE, rows, REJECTED)


def utf8(text: str) -> str:
    """Text as valid UTF-8; undecodable bytes of a file name are replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
