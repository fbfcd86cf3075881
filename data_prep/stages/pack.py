"""The last stage: the shards of a run put together as one store, with attribution, Croissant metadata, quarantine."""

import csv
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.reports.attribution import write_attribution
from data_prep.reports.croissant import write_croissant
from data_prep.stages.codes import CODES_FILE
from data_prep.stages.embed import TEXT_FILE
from data_prep.stages.segments import Segments
from data_prep.status import WORK
from data_prep.tables import REJECTED, REJECTED_FILE
from ssmttm.data.store import SPLITS, Store, text_name
from ssmttm.data.tensorfile import map_tensors
from ssmttm.data.text_table import merge_text_tables
from ssmttm.data.writer import StoreWriter
from ssmttm.files import atomic_write, fsync

REJECTED_CSV, DECONTAMINATION = "rejected.csv", "decontamination.json"


@dataclass(frozen=True)
class Parts:
    """What the stages made, shard by shard.

    Attributes:
        segments: rows and audio.
        codes: the folders of the codes, or None.
        texts: the folders of the embeddings, or None.
        folders: every finished folder, of which some hold a quarantine table or the decontamination.
    """

    segments: Sequence[Segments]
    codes: Sequence[Path] | None
    texts: Sequence[Path] | None
    folders: Sequence[Path]


def pack(
    parts: Parts,
    out: Path,
    config: dict[str, Any],
    codec: dict[str, Any] | None,
    text: dict[str, Any] | None,
    sample_rate: int,
) -> Store:
    """Put a store together; what is there of an earlier run is replaced.

    Args:
        config: everything that decided what the store holds.
        codec, text: facts of the encoders, as store.json keeps them.
        sample_rate: Hz of the audio.
    """
    writer = StoreWriter(out, config, codec, sample_rate)
    kept: set[str] = set()
    for index, segments in enumerate(parts.segments):
        codes = None if parts.codes is None else _codes(parts.codes[index])
        for number, row in enumerate(segments.read()):
            name = audio_name(row["id"])
            share(segments.audio / row["audio"], out / name)
            kept.add(name)
            writer.add(row | {"audio": name}, None if codes is None else codes[number])
    if parts.texts is not None and text is not None:
        merge_text_tables(out / text_name(text["name"]), [folder / TEXT_FILE for folder in parts.texts])
    write_rejected_csv(out / REJECTED_CSV, parts.folders)
    _copy_decontamination(out, parts.folders)
    store = writer.finish(text)
    _settle(out / "audio", kept)
    for name in ("shards", "text"):
        _settle(out / name, set(store.info["files"]))
    write_attribution(store)
    write_croissant(store)
    return store


def audio_name(segment: str) -> str:
    """Where a store keeps a segment's audio: 256 folders, so that none grows beyond what a file system likes."""
    return f"audio/{hashlib.sha256(segment.encode()).hexdigest()[:2]}/{segment}.flac"


def share(source: Path, target: Path) -> None:
    """The same file at another place: a hard link where the disk allows, else a copy."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
        fsync(aside)
    aside.replace(target)


def write_rejected_csv(path: Path, folders: Iterable[Path]) -> None:
    """Gather the quarantine tables of all stages: item, stage, kind, reason."""
    with atomic_write(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(REJECTED.names)
        for folder in folders:
            if (folder / REJECTED_FILE).is_file():
                table.writerows(row.values() for row in pq.read_table(folder / REJECTED_FILE).to_pylist())


def summary(store: Store) -> str:
    """One line: segments, hours by split, size, place; another one if anything was refused."""
    counts, hours = store.info["counts"], store.info["hours"]
    splits = ", ".join(f"{split} {counts[split]} / {hours[split]:.2f} h" for split in SPLITS)
    codec, text = store.info["codec"], store.info["text"]
    with open(store.path / REJECTED_CSV, encoding="utf-8", newline="") as file:
        rejected = sum(1 for _ in csv.DictReader(file))
    why = f"\n{rejected} refused, {store.path / REJECTED_CSV} says why" if rejected else ""
    return (
        f"{store.path}: {len(store)} segments, {sum(hours.values()):.2f} h ({splits}), "
        f"{_bytes(store.path) / 1e6:.1f} MB, "
        f"codec {codec['name'] if codec else 'none'}, text {text['name'] if text else 'none'}{why}"
    )


def _bytes(store: Path) -> int:
    """The size of a store without the folder of its work."""
    size = 0
    for place, folders, names in os.walk(store):
        if Path(place) == store and WORK in folders:
            folders.remove(WORK)
        size += sum(os.stat(os.path.join(place, name)).st_size for name in names)
    return size


def _codes(folder: Path) -> list[Any]:
    """uint16 [K, T] of each segment of a shard, memory-mapped."""
    tensors = map_tensors(folder / CODES_FILE)
    edges = tensors["offsets"].tolist()
    return [tensors["codes"][:, first:end] for first, end in pairwise(edges)]


def _copy_decontamination(out: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        if (folder / DECONTAMINATION).is_file():
            with atomic_write(out / DECONTAMINATION) as aside:
                shutil.copyfile(folder / DECONTAMINATION, aside)


def _settle(folder: Path, kept: set[str]) -> None:
    """Remove files that an earlier run left and this store does not name; see that the others are on the disk."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.relative_to(folder.parent).as_posix() not in kept:
                path.unlink()
        fsync(Path(place))
