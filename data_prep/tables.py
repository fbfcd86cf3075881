"""The tables that pass between stages, as Arrow schemas."""

import pyarrow as pa

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
    }
)
QUARANTINE = pa.schema({"item": _TEXT, "stage": _TEXT, "kind": _TEXT, "reason": _TEXT})
