"""Writing a store: rows and codes are streamed to disk, `store.json` comes last and marks the store as finished.

Memory does not grow with the store: one shard of codes and one batch of rows are in memory.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssmttm.config import flatten
from ssmttm.data.annotations import annotation_columns
from ssmttm.data.splits import SPLITS
from ssmttm.data.store import FORMAT, VERSION, Store, manifest_schema, open_store, shard_name, text_name
from ssmttm.data.tensorfile import write_tensors
from ssmttm.errors import UserError
from ssmttm.files import atomic_write, config_hash, file_entry, write_text
from ssmttm.licences import strictest

CONFIG_FILE = "prep.json"
_DEFAULTS: dict[str, Any] = {"shard": -1, "offset": 0, "frames": 0, "tags": [], "captions": []}
_REQUIRED = ("id", "split", "licence", "duration")
_SHOWN = 3  # settings that differ, in an error message


class StoreWriter:
    """Writes one store, rows in the order of `add`. Raises UserError if the folder holds a store of another config.

    Args:
        path: the store's folder.
        config: everything that determines the codes, as JSON.
        codec: name, fingerprint, sample_rate, frame_rate, n_codebooks, codebook_size; None for an audio-only store.
        latents: name, fingerprint, sample_rate, frame_rate, latent_channels, frames_per_code of a VAE; None for a
            store without its latents.
        sample_rate: Hz of the store's audio files.
        channels: 1 or 2, of these.
        shard_segments: segments per shard.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        codec: dict[str, Any] | None = None,
        sample_rate: int | None = None,
        shard_segments: int = 2048,
        channels: int = 1,
        latents: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self._vae = latents
        self._config, self._codec, self._sample_rate = config, codec, sample_rate
        self._shard_segments, self._channels = shard_segments, channels
        self._schema = manifest_schema(channels)
        check_same_config(self.path, config)
        (self.path / "store.json").unlink(missing_ok=True)
        self._spool = tempfile.TemporaryFile(dir=self.path)  # noqa: SIM115 - read by finish
        self._batches = pa.ipc.new_stream(self._spool, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._codes: list[np.ndarray] = []
        self._latents: list[np.ndarray] = []
        self._shards = 0
        self._counts: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._licences: Counter[str] = Counter()

    def add(self, row: dict[str, Any], codes: np.ndarray | None = None, latents: np.ndarray | None = None) -> None:
        """Add one segment.

        Args:
            row: the manifest's columns; `id`, `split`, `licence` and `duration` are required. The size and the hash of
                the file `audio` are added, if it is in the store already, and key, metre and bars from `truth`.
            codes: [K, frames] integers; None for an audio-only store.
            latents: [c, frames * frames_per_code] floats; None for a store without.

        Raises:
            UserError: an annotation cannot be used, or the latents are not finite in float16.
        """
        missing = [key for key in _REQUIRED if row.get(key) is None]
        unknown = sorted(row.keys() - set(self._schema.names))
        if missing or unknown or row["split"] not in SPLITS:
            raise ValueError(f"bad manifest row: missing {missing}, unknown {unknown}, split {row.get('split')!r}")
        annotations = row.get("truth")
        stated = json.loads(annotations) if isinstance(annotations, str) else annotations
        try:
            columns = annotation_columns(stated) if isinstance(stated, dict) else {}
        except UserError as error:
            raise UserError(f"segment {row['id']}: {error}: correct its annotations") from error
        if isinstance(annotations, dict):
            annotations = json.dumps(annotations)
        if self._codec is not None:
            if codes is None or codes.shape[0] != self._codec["n_codebooks"]:
                raise ValueError(f"segment {row['id']} needs codes [{self._codec['n_codebooks']}, frames]")
            self._codes.append(codes.astype(np.uint16))
        if self._vae is not None:
            self._latents.append(self._checked_latents(row["id"], self._codes[-1].shape[1], latents))
        audio = self.path / (row.get("audio") or "")
        entry = file_entry(audio) if audio.is_file() else {}
        hashes = {"audio_bytes": entry.get("bytes"), "audio_sha256": entry.get("sha256")}
        self._rows.append({**_DEFAULTS, **row, **columns, "truth": annotations, **hashes})
        self._counts[row["split"]] += 1
        self._seconds[row["split"]] += row["duration"]
        self._licences[row["licence"]] += 1
        if len(self._rows) >= self._shard_segments:
            self._flush()

    def finish(self, text: dict[str, Any] | None = None) -> Store:
        """Write the manifest and store.json. `text`: name, fingerprint and dim of the encoder of text/."""
        self._flush()
        self._write_manifest()
        names = ["manifest.parquet", *map(shard_name, range(self._shards))]
        names += [text_name(text["name"])] if text else []
        info = {
            "format": FORMAT,
            "version": VERSION,
            "codec": self._codec,
            "text": text,
            "sample_rate": self._sample_rate,
            "channels": self._channels,
            **({} if self._vae is None else {"latents": self._vae}),
            "counts": {split: self._counts[split] for split in SPLITS},
            "hours": {split: round(self._seconds[split] / 3600, 4) for split in SPLITS},
            "licences": dict(sorted(self._licences.items())),
            "licence": strictest(self._licences) if self._licences else None,
            "config_hash": config_hash(self._config),
            "config": self._config,
            "files": {name: file_entry(self.path / name) for name in names},
        }
        write_text(self.path / "store.json", json.dumps(info, indent=2) + "\n")
        return open_store(self.path)

    def _flush(self) -> None:
        """Write the added segments as a shard, and their rows as a batch."""
        if self._codes:
            offsets = np.cumsum([0, *(codes.shape[1] for codes in self._codes)], dtype=np.int64)  # [n+1]
            tensors = {"codes": np.concatenate(self._codes, axis=1), "offsets": offsets}  # codes [K, T_total]
            if self._latents:
                tensors["latents"] = np.concatenate(self._latents, axis=1)  # [c, T_total * frames_per_code]
            write_tensors(self.path / shard_name(self._shards), tensors)
            for index, row in enumerate(self._rows):
                frames = int(offsets[index + 1] - offsets[index])
                row.update(shard=self._shards, offset=int(offsets[index]), frames=frames)
            self._shards += 1
        if self._rows:
            self._batches.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()
        self._codes.clear()
        self._latents.clear()

    def _checked_latents(self, segment: str, frames: int, latents: np.ndarray | None) -> np.ndarray:
        """As float16."""
        assert self._vae is not None
        shape = self._vae["latent_channels"], frames * self._vae["frames_per_code"]
        if latents is None or latents.shape != shape:
            raise ValueError(f"segment {segment} needs latents {list(shape)}")
        with np.errstate(over="ignore"):
            half = latents.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"segment {segment}: its latents are NaN or beyond float16: drop that audio")
        return half

    def _write_manifest(self) -> None:
        self._batches.close()
        self._spool.seek(0)
        path = self.path / "manifest.parquet"
        with atomic_write(path) as temporary:
            with (
                self._spool,
                pa.ipc.open_stream(self._spool) as batches,
                pq.ParquetWriter(temporary, self._schema) as manifest,
            ):
                for batch in batches:
                    manifest.write_batch(batch)
            found = pc.value_counts(pq.read_table(temporary, columns=["id"])["id"])
            duplicates = found.field("values").filter(pc.greater(found.field("counts"), 1))
            if len(duplicates):
                raise ValueError(f"segment {duplicates[0]} was added twice")


def check_same_config(path: Path, config: dict[str, Any]) -> None:
    """Record the config of a store folder. Raises UserError if another one is recorded.

    A key that was null may get a value: codes can be added to an audio-only store.
    """
    file = path / CONFIG_FILE
    if not file.exists():
        _write_config(file, config)
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: prepare into a new folder") from error
    old, new = _values(known), _values(json.loads(json.dumps(config)))
    keys = old.keys() | new.keys()  # changed values first, and among them names
    order = sorted(keys, key=lambda key: (None in (old.get(key), new.get(key)), "name" not in key, key))
    changes = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in order
               if old.get(key) != new.get(key) and known.get(key.split(".")[0], 0) is not None]  # fmt: skip
    if changes:
        changed = ", ".join(changes[:_SHOWN]) + (f" and {len(changes) - _SHOWN} more" if changes[_SHOWN:] else "")
        raise UserError(f"{path} was prepared with other settings ({changed}): give the same ones or another folder")
    if new != old:
        _write_config(file, config)


def _write_config(file: Path, config: dict[str, Any]) -> None:
    write_text(file, json.dumps({"config_hash": config_hash(config), "config": config}, indent=2) + "\n")


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """`flatten`, without empty mappings."""
    return {key: value for key, value in flatten(config).items() if value != {}}
