"""Export of a store as WebDataset archives.

Shapes: K codebooks, T frames.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.files import file_sha256, new_folder

INDEX = "dataset.json"
_MAX_KEY = 100  # letters
_Files = list[tuple[str, bytes]]  # names and contents
_STORE_COLUMNS = {"shard", "offset", "audio", "audio_bytes", "audio_sha256"}  # of the store, not of the segment


def export(store: Store, out: Path, shard_bytes: int = 1 << 30) -> list[Path]:
    """Write a store as WebDataset archives, with the same bytes for the same store.

    A segment becomes `KEY.flac`, `KEY.json` (its row of the manifest) and, if it has codes, `KEY.codes.npy` (uint16
    [K, T]). KEY is the percent-encoded id; a long one is cut and ends in a hash. ATTRIBUTION.csv and dataset.json
    (codec, rate, counts, sha256 of each archive) are written beside the archives.

    Args:
        out: a new folder; a UserError if it exists.
        shard_bytes: maximum size of an archive with more than one segment.
    """
    with new_folder(out) as folder:
        names = _write_archives(store, folder, shard_bytes)
        shards = [{"name": name, "sha256": file_sha256(folder / name)} for name in names]
        info = {name: store.info.get(name) for name in ("codec", "sample_rate", "counts", "hours")}
        (folder / INDEX).write_text(json.dumps({**info, "shards": shards}, indent=2) + "\n", encoding="utf-8")
        with suppress(FileNotFoundError):
            (folder / "ATTRIBUTION.csv").write_bytes((store.path / "ATTRIBUTION.csv").read_bytes())
    return [out / name for name in names]


def _write_archives(store: Store, folder: Path, shard_bytes: int) -> list[str]:
    capacity = shard_bytes - 10_240  # an archive is padded to a multiple of that
    names: list[str] = []
    with ExitStack() as stack:
        left = 0
        for sample in _samples(store):
            size = sum(1024 + len(data) for _, data in sample)  # with headers and padding
            if not names or (size > left and left < capacity):
                stack.close()
                names.append(f"shard-{len(names):06d}.tar")
                archive = stack.enter_context(tarfile.open(folder / names[-1], "x", format=tarfile.PAX_FORMAT))
                left = capacity
            for name, data in sample:
                entry = tarfile.TarInfo(name)  # no time, no owner, mode 0644
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            left -= size
    return names


def _samples(store: Store) -> Iterator[_Files]:
    """The files of each segment."""
    index = 0
    for batch in store.manifest.to_batches():
        for row in batch.to_pylist():
            key = _key(row["id"])
            metadata = {name: value for name, value in row.items() if name not in _STORE_COLUMNS}
            sample = [(f"{key}.json", json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode())]
            if row["audio"] is not None:
                path = store.audio_path(index)
                try:
                    sample.insert(0, (f"{key}{path.suffix}", path.read_bytes()))
                except FileNotFoundError as error:
                    raise UserError(f"{path} is missing: restore it, or prepare the store again") from error
            if row["shard"] >= 0:
                codes = io.BytesIO()
                np.save(codes, store.codes(index), allow_pickle=False)  # uint16 [K, T]
                sample.append((f"{key}.codes.npy", codes.getvalue()))
            yield sample
            index += 1


def _key(name: str) -> str:
    key = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    return key if len(key) <= _MAX_KEY else f"{key[:_MAX_KEY]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
