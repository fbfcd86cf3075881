"""Writing a store: shards of bounded size, each whole or absent, `store.json` last, so that a stopped run goes on.

A shard carries the ids of its segments and the hash of the config it was made under. A second run with the same config
takes every finished shard as it stands; with another config it is refused before anything is touched.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssmttm.data.store import FORMAT, SCHEMA, SPLITS, VERSION, Store, open_store, shard_name, text_name
from ssmttm.data.tensorfile import map_tensors, read_header, write_tensors
from ssmttm.errors import UserError
from ssmttm.files import file_sha256, write_text, written_aside

_DEFAULTS: dict[str, Any] = {"shard": -1, "offset": 0, "frames": 0, "tags": [], "captions": []}
_REQUIRED = ("id", "split", "licence", "duration")


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of a config's sha256, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class StoreWriter:
    """Writes one store, or goes on with one that was stopped.

    Args:
        path: the store's folder.
        config: everything that decides what the codes are; a JSON-able dict.
        codec: name, fingerprint, sample_rate, frame_rate, n_codebooks, codebook_size; None for a store of audio only.
        sample_rate: Hz of the store's audio files.
        shard_segments: segments a shard, the unit of what a stopped run keeps.

    Raises:
        UserError: the folder holds a store of another config.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        codec: dict[str, Any] | None = None,
        sample_rate: int | None = None,
        shard_segments: int = 2048,
    ) -> None:
        self.path = Path(path)
        self.config_hash = config_hash(config)
        self._codec, self._sample_rate, self._shard_segments = codec, sample_rate, shard_segments
        claim(self.path, config)
        self._done: dict[str, tuple[int, int, int]] = {}  # id -> shard, offset, frames
        self._rows: dict[str, dict[str, Any]] = {}
        self._pending: list[tuple[str, np.ndarray]] = []
        self._next_shard = 0
        if codec is not None:
            self._read_finished_shards()

    def __contains__(self, segment_id: str) -> bool:
        """Whether the segment's codes are on disk already."""
        return segment_id in self._done

    def add(self, row: dict[str, Any], codes: np.ndarray | None = None) -> None:
        """Add one segment.

        Args:
            row: the manifest's columns; `id`, `split`, `licence` and `duration` are needed, the rest has defaults.
            codes: [K, frames] integers; None for an audio-only store or a segment whose codes are on disk already.
        """
        missing = [key for key in _REQUIRED if row.get(key) is None]
        unknown = sorted(row.keys() - set(SCHEMA.names))
        if missing or unknown or row["split"] not in SPLITS:
            raise ValueError(f"bad manifest row: missing {missing}, unknown {unknown}, split {row.get('split')!r}")
        if row["id"] in self._rows:
            raise ValueError(f"segment {row['id']} was added twice")
        truth = row.get("truth")
        self._rows[row["id"]] = {**_DEFAULTS, **row, "truth": json.dumps(truth) if isinstance(truth, dict) else truth}
        if self._codec is None or row["id"] in self._done:
            return
        if codes is None or codes.shape[0] != self._codec["n_codebooks"]:
            raise ValueError(f"segment {row['id']} needs codes [{self._codec['n_codebooks']}, frames]")
        self._pending.append((row["id"], codes.astype(np.uint16)))
        if len(self._pending) >= self._shard_segments:
            self.flush()

    def flush(self) -> None:
        """Write the segments added so far as a shard."""
        if not self._pending:
            return
        ids = [segment_id for segment_id, _ in self._pending]
        lengths = [codes.shape[1] for _, codes in self._pending]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # [n+1]
        codes = np.concatenate([codes for _, codes in self._pending], axis=1)  # [K, T_total]
        metadata = {"config_hash": self.config_hash, "ids": json.dumps(ids)}
        write_tensors(self.path / shard_name(self._next_shard), {"codes": codes, "offsets": offsets}, metadata)
        self._take(self._next_shard, ids, offsets)
        self._next_shard += 1
        self._pending.clear()

    def finish(self, text: dict[str, Any] | None = None) -> Store:
        """Write the manifest, ATTRIBUTION.csv and, last, store.json; returns the store, opened.

        Args:
            text: name, fingerprint, dim of the encoder whose embeddings stand under text/.
        """
        self.flush()
        rows = [self._located(row) for _, row in sorted(self._rows.items())]
        (self.path / "store.json").unlink(missing_ok=True)
        with written_aside(self.path / "manifest.parquet") as aside:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), aside)
        names = ["manifest.parquet"]
        names += [shard_name(shard) for shard in sorted({row["shard"] for row in rows} - {-1})]
        names += [text_name(text["name"])] if text else []
        info = {
            "format": FORMAT,
            "version": VERSION,
            "codec": self._codec,
            "text": text,
            "sample_rate": self._sample_rate,
            "counts": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
            "hours": {split: _hours(rows, split) for split in SPLITS},
            "licences": dict(sorted(Counter(row["licence"] for row in rows).items())),
            "config_hash": self.config_hash,
            "config": json.loads((self.path / "prep.json").read_text())["config"],
            "files": {name: _entry(self.path / name) for name in names},
        }
        write_text(self.path / "store.json", json.dumps(info, indent=2) + "\n")
        return open_store(self.path)

    def _located(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._codec is None:
            return row
        shard, offset, frames = self._done[row["id"]]
        return {**row, "shard": shard, "offset": offset, "frames": frames}

    def _take(self, shard: int, ids: list[str], offsets: np.ndarray) -> None:
        for index, segment_id in enumerate(ids):
            first, last = int(offsets[index]), int(offsets[index + 1])
            self._done[segment_id] = (shard, first, last - first)

    def _read_finished_shards(self) -> None:
        while (self.path / shard_name(self._next_shard)).exists():
            file = self.path / shard_name(self._next_shard)
            metadata = read_header(file)[1]
            if metadata.get("config_hash") != self.config_hash:
                raise UserError(f"{file} was made under another config: prepare into a fresh folder")
            self._take(self._next_shard, json.loads(metadata["ids"]), map_tensors(file)["offsets"])
            self._next_shard += 1


def claim(path: Path, config: dict[str, Any]) -> None:
    """Make `path` the folder of this config's store, or check that it is.

    What was null before may be filled in: a store of audio may be given codes.

    Raises:
        UserError: it is the folder of another config; the line names what differs.
    """
    file = path / "prep.json"
    if not file.exists():
        _write_claim(file, config)
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: prepare into a fresh folder") from error
    old, new = _flat(known), _flat(config)
    changes = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys())
               if old.get(key) != new.get(key) and known.get(key.split(".")[0], 0) is not None]  # fmt: skip
    if changes:
        changed = ", ".join(changes)
        raise UserError(f"{path} was prepared with other settings ({changed}): give the same ones or another folder")
    _write_claim(file, config)


def _write_claim(file: Path, config: dict[str, Any]) -> None:
    write_text(file, json.dumps({"config_hash": config_hash(config), "config": config}, indent=2) + "\n")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _hours(rows: list[dict[str, Any]], split: str) -> float:
    return round(sum(row["duration"] for row in rows if row["split"] == split) / 3600, 4)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
