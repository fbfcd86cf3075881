"""croissant.json: the metadata of a store as JSON-LD in the vocabulary of Croissant 1.1 (MLCommons, 2026-01-29).

The specification requires `url` and `creator`: `url` is the folder itself, `creator` the authors in ATTRIBUTION.csv.
Change both where you publish a store.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import ssmttm
from ssmttm.data.store import SPLITS, Store
from ssmttm.files import file_sha256, write_text

FILE = "croissant.json"
_CONTEXT = Path(__file__).with_name("croissant_context.json")  # the @context that the specification recommends
_TYPES = {pa.string(): "sc:Text", pa.float64(): "cr:Float64", pa.int32(): "cr:Int32", pa.int64(): "cr:Int64"}
_SPLIT_TERMS = {"train": "cr:TrainingSplit", "valid": "cr:ValidationSplit", "test": "cr:TestSplit"}
_FILES = {
    "manifest.parquet": "application/x-parquet", "ATTRIBUTION.csv": "text/csv", "store.json": "application/json",
}  # fmt: skip
_FOLDERS = {
    "audio": ("audio/flac", ["audio/*.flac", "audio/*/*.flac"]),
    "shards": ("application/octet-stream", ["shards/*.safetensors"]),
    "text": ("application/octet-stream", ["text/*.safetensors"]),
}
_DESCRIPTIONS = {
    "id": "the segment",
    "shard": "number of the file under shards/, -1 without codes",
    "offset": "first frame within the shard",
    "frames": "length in frames of the codec",
    "captions": "texts that describe the segment",
    "tags": "category---name, such as genre---rock",
    "split": "train, valid or test; no track and no known artist is in two splits",
    "licence": "SPDX identifier of the work's licence",
    "licence_url": "text of the licence",
    "evidence": "where the licence is stated",
    "title": "title of the work",
    "author": "author of the work",
    "source_url": "where the work was published",
    "modifications": "changes made to the work",
    "content_hash": "sha256 of the audio",
    "duration": "length in seconds",
    "audio": "path of the audio file inside the store",
    "audio_bytes": "size of the audio file in bytes",
    "audio_sha256": "SHA-256 of the audio file",
    "loudness": "loudness of the audio in LUFS",
    "truth": "JSON: ground-truth annotations, such as tempo and key",
    "key": "key, such as D minor",
    "metre": "metre, such as 3/4",
    "bars": "times of the bar lines in seconds from the segment's start",
    "track": "the work that the segment was cut from",
    "start": "where the segment starts in the track, in seconds",
    "track_duration": "length of the track in seconds",
    "width": "the side's fraction of the energy, 0 for equal channels",
    "correlation": "of the two channels",
    "balance": "level of the left channel over the right one in dB",
    "artist": "identity of the artist across data sets",
    "work": "identity of the recording across data sets",
}


def write_croissant(store: Store) -> Path:
    """Write the store's croissant.json and return its path. ATTRIBUTION.csv is described if it is there."""
    path = store.path / FILE
    write_text(path, json.dumps(_dataset(store), indent=2, ensure_ascii=False) + "\n")
    return path


def _dataset(store: Store) -> dict[str, Any]:
    name = store.path.resolve().name
    made = datetime.fromtimestamp((store.path / "store.json").stat().st_mtime, UTC)
    title = f"{name}: {len(store)} segments of music"
    note = f"Prepared with ssmttm {ssmttm.__version__}; store {store.fingerprint}"
    return {
        "@context": json.loads(_CONTEXT.read_text(encoding="utf-8")),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": name,
        "description": _summary(store),
        "license": sorted(filter(None, pc.unique(store.manifest["licence_url"]).to_pylist())),
        "url": "./",
        "creator": {"@type": "sc:Organization", "name": "the authors listed in ATTRIBUTION.csv"},
        "datePublished": made.date().isoformat(),
        "version": f"1.0.0+{store.fingerprint}",
        "keywords": ["music", "text-to-music"],
        "citeAs": f"@misc{{{name}, title = {{{title}}}, year = {{{made.year}}}, note = {{{note}}}}}",
        "isLiveDataset": False,
        "distribution": _distribution(store),
        "recordSet": [_splits(store), _segments(store)],
    }


def _summary(store: Store) -> str:
    info = store.info
    splits = ", ".join(f"{split} {info['counts'][split]} ({info['hours'][split]:g} h)" for split in SPLITS)
    audio = "audio, " if store.manifest["audio"].null_count < len(store) else ""
    codes = f"codes of {info['codec']['name']}" if info["codec"] else "no codes"
    text = f"caption embeddings of {info['text']['name']}" if info["text"] else "no caption embeddings"
    works = "; ".join(f"{licence} {count}" for licence, count in info["licences"].items())
    return (
        f"{len(store)} segments of music with captions and tags: {splits}. It holds {audio}{codes} and {text}. "
        f"Each work has its own licence, stated in ATTRIBUTION.csv and the manifest; segments by licence: {works}."
    )


def _distribution(store: Store) -> list[dict[str, Any]]:
    nodes = []
    for name, media_type in _FILES.items():
        path = store.path / name
        if path.is_file():
            known = store.info["files"].get(name) or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            node = {"contentUrl": name, "contentSize": f"{known['bytes']} B", "encodingFormat": media_type}
            nodes.append(_node("cr:FileObject", name, **node, sha256=known["sha256"]))
    for name, (media_type, includes) in _FOLDERS.items():
        if (store.path / name).is_dir():
            nodes.append(_node("cr:FileSet", name, encodingFormat=media_type, includes=includes))
    return nodes


def _splits(store: Store) -> dict[str, Any]:
    """The splits with their size; an enumeration that the segments refer to."""
    types = {"name": "sc:Text", "url": "sc:URL", "segments": "sc:Integer", "hours": "sc:Float"}
    fields = [_node("cr:Field", name, "splits/", dataType=type_) for name, type_ in types.items()]
    counts, hours = store.info["counts"], store.info["hours"]
    rows = [(split, _SPLIT_TERMS[split], counts[split], hours[split]) for split in SPLITS]
    data = [{f"splits/{name}": value for name, value in zip(types, row, strict=True)} for row in rows]
    key = {"@id": "splits/name"}
    return _node("cr:RecordSet", "splits", dataType="cr:Split", key=key, field=fields, data=data)


def _segments(store: Store) -> dict[str, Any]:
    description = "the manifest: one record per segment"
    fields = [_field(column) for column in store.manifest.schema]
    return _node("cr:RecordSet", "segments", description=description, key={"@id": "segments/id"}, field=fields)


def _field(column: pa.Field) -> dict[str, Any]:
    is_list = pa.types.is_list(column.type)
    field = _node(
        "cr:Field",
        column.name,
        "segments/",
        description=_DESCRIPTIONS.get(column.name, column.name),
        dataType=_TYPES.get(column.type.value_type if is_list else column.type, "sc:Text"),
        source={"fileObject": {"@id": "manifest.parquet"}, "extract": {"column": column.name}},
    )
    if is_list:
        field |= {"isArray": True, "arrayShape": "-1"}
    if column.name == "split":
        field |= {"dataType": ["sc:Text", "cr:Split"], "references": {"field": {"@id": "splits/name"}}}
    return field


def _node(type_: str, name: str, prefix: str = "", **properties: Any) -> dict[str, Any]:
    return {"@type": type_, "@id": prefix + name, "name": name, **properties}
