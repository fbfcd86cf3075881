"""The tables that pass between stages, as Arrow schemas, and how they are written."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.track import Rejection

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())

TRACKS = pa.schema(
    {
        "id": _TEXT,
        "path": _TEXT,
        "licence": _TEXT,  # SPDX identifier
        "licence_url": _TEXT,
        "title": _TEXT,
        "author": _TEXT,
        "source_url": _TEXT,
        "artist": _TEXT,
        "work": _TEXT,
        "evidence": _TEXT,
        "captions": _TEXTS,
        "tags": _TEXTS,
        "split": _TEXT,
    }
)
SOUNDS = pa.schema(
    {
        "id": _TEXT,  # of the track
        "file_sha256": _TEXT,
        "pcm_sha256": _TEXT,  # of the decoded samples: what remains when only tags differ
        "seconds": pa.float64(),
    }
)
SEGMENTS = pa.schema(
    {
        "id": _TEXT,
        "track": _TEXT,
        "duration": pa.float64(),  # seconds
        "audio": _TEXT,  # file name within the shard's folder
        "content_hash": _TEXT,  # sha256 of the 16-bit samples
        "loudness": pa.float64(),  # LUFS
        "truth": _TEXT,  # JSON, or null
        "captions": _TEXTS,  # of this segment; null: those of the track
        "tags": _TEXTS,  # the same
    }
)
REJECTED_FILE = "quarantine.parquet"
REJECTED = pa.schema({"item": _TEXT, "stage": _TEXT, "kind": _TEXT, "reason": _TEXT})


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as a Parquet table."""
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_rejected(folder: Path, stage: str, rejected: list[Rejection]) -> None:
    """Write what a stage refused on a shard as `quarantine.parquet`, sorted."""
    rows = [{"stage": stage, **asdict(rejection)} for rejection in rejected]
    rows = [{name: printable(value) for name, value in row.items()} for row in rows]
    rows.sort(key=lambda row: (row["item"], row["kind"], row["reason"]))
    write_rows(folder / REJECTED_FILE, rows, REJECTED)


def printable(text: str) -> str:
    """Text that can be written as UTF-8, whatever a file name holds."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
