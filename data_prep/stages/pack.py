"""The stage `pack`: assemble the shards of a run to a store, with attribution and Croissant metadata."""

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
from data_prep.stages.embed import TEXT_FILE
from data_prep.stages.encode import CODES_FILE
from data_prep.stages.latents import LATENTS_FILE
from data_prep.stages.segments import Segments
from data_prep.status import WORK
from data_prep.tables import REJECTED, REJECTED_FILE
from ssmttm.audio.stereo import is_dual_mono
from ssmttm.data.store import SPLITS, Store, text_name
from ssmttm.data.tensorfile import map_tensors
from ssmttm.data.text_table import merge_text_tables
from ssmttm.data.writer import StoreWriter
from ssmttm.files import atomic_write, fsync

REJECTED_CSV, DECONTAMINATION = "rejected.csv", "decontamination.json"


@dataclass(frozen=True)
class Parts:
    """The results of the stages, shard by shard."""

    segments: Sequence[Segments]
    codes: Sequence[Path] | None  # folders
    latents: Sequence[Path] | None  # folders
    texts: Sequence[Path] | None  # folders of the caption embeddings
    folders: Sequence[Path]  # of all stages; some hold rejections or a decontamination report


def pack(
    parts: Parts,
    out: Path,
    config: dict[str, Any],
    codec: dict[str, Any] | None,
    latents: dict[str, Any] | None,
    text: dict[str, Any] | None,
    sample_rate: int,
    channels: int = 1,
) -> Store:
    """Assemble a store; the files of an earlier run are replaced.

    Args:
        config: everything that decides the contents of the store.
        codec, latents, text: metadata of codec, VAE and text encoder, for store.json.
        sample_rate: of the audio, in Hz.
        channels: of the audio, 1 or 2.
    """
    writer = StoreWriter(out, config, codec, sample_rate, channels=channels, latents=latents)
    kept: set[str] = set()
    for index, segments in enumerate(parts.segments):
        codes = None if parts.codes is None else _map_segments(parts.codes[index] / CODES_FILE, "codes")
        own = None if parts.latents is None else _map_segments(parts.latents[index] / LATENTS_FILE, "latents")
        for number, row in enumerate(segments.read()):
            name = _audio_name(row["id"])
            link_or_copy(segments.audio / row["audio"], out / name)
            kept.add(name)
            encoded = [None if segments_of is None else segments_of[number] for segments_of in (codes, own)]
            writer.add(row | {"audio": name}, *encoded)
    if parts.texts is not None and text is not None:
        merge_text_tables(out / text_name(text["name"]), [folder / TEXT_FILE for folder in parts.texts])
    write_rejected_csv(out / REJECTED_CSV, parts.folders)
    for folder in parts.folders:
        if (folder / DECONTAMINATION).is_file():
            with atomic_write(out / DECONTAMINATION) as temporary:
                shutil.copyfile(folder / DECONTAMINATION, temporary)
    store = writer.finish(text)
    _remove_others(out / "audio", kept)
    for name in ("shards", "text"):
        _remove_others(out / name, set(store.info["files"]))
    write_attribution(store)
    write_croissant(store)
    return store


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system allows no link."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        fsync(temporary)
    temporary.replace(target)


def write_rejected_csv(path: Path, folders: Iterable[Path]) -> None:
    """Gather the rejections of all stages: item, stage, kind, reason."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(REJECTED.names)
        for folder in folders:
            if (folder / REJECTED_FILE).is_file():
                table.writerows(row.values() for row in pq.read_table(folder / REJECTED_FILE).to_pylist())


def summary(store: Store) -> str:
    """A line with segments, hours by split and size, and a line with the number of rejections if there are any."""
    counts, hours = store.info["counts"], store.info["hours"]
    splits = ", ".join(f"{split} {counts[split]} / {hours[split]:.2f} h" for split in SPLITS)
    codec, vae, text = store.info["codec"], store.info.get("latents"), store.info["text"]
    latents = f"latents of {vae['name']}, " if vae else ""
    with open(store.path / REJECTED_CSV, encoding="utf-8", newline="") as file:
        rejected = sum(1 for _ in csv.DictReader(file))
    equal = dual_mono_segments(store)
    of = f"{equal} of {len(store)} segments have two equal channels"
    rejections = f"\n{of}: --reject-dual-mono leaves them out" if equal else ""
    rejections += f"\n{rejected} rejected, see {store.path / REJECTED_CSV}" if rejected else ""
    return (
        f"{store.path}: {len(store)} segments, {sum(hours.values()):.2f} h ({splits}), "
        f"{_size(store.path) / 1e6:.1f} MB, "
        f"codec {codec['name'] if codec else 'none'}, {latents}text {text['name'] if text else 'none'}{rejections}"
    )


def dual_mono_segments(store: Store) -> int:
    """The number of segments of a stereo store whose channels are the same: mono files, and mono in stereo."""
    if store.channels == 1:
        return 0
    return sum(is_dual_mono(width) for width in store.manifest["width"].to_pylist())


def _audio_name(segment: str) -> str:
    """The audio file of a segment, in one of 256 folders."""
    return f"audio/{hashlib.sha256(segment.encode()).hexdigest()[:2]}/{segment}.flac"


def _size(store: Path) -> int:
    """Bytes of a store without its work folder."""
    size = 0
    for folder, folders, names in os.walk(store):
        if Path(folder) == store and WORK in folders:
            folders.remove(WORK)
        size += sum(os.stat(os.path.join(folder, name)).st_size for name in names)
    return size


def _map_segments(file: Path, name: str) -> list[Any]:
    """The part of a shard's tensor [K, T] that is of each segment, memory-mapped."""
    tensors = map_tensors(file)
    offsets = tensors["offsets"].tolist()
    return [tensors[name][:, first:end] for first, end in pairwise(offsets)]


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Remove the files that the store does not name, and fsync the folders."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.relative_to(folder.parent).as_posix() not in kept:
                path.unlink()
        fsync(Path(place))
