"""croissant.json: what a store holds, in the vocabulary of Croissant 1.1 (MLCommons, 2026-01-29), as JSON-LD.

What the specification asks for and a folder on a disk does not have is filled in with what is true of it: `url` is the
folder itself, `creator` are the authors that ATTRIBUTION.csv names. Change both where you publish a store.
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
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
} | {
    name: f"cr:{name}"
    for name in (
        "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes", "extract", "field",
        "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key",
        "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate",
        "sdVersion", "separator", "source", "subField", "transform",
    )
}  # fmt: skip
_TYPES = {pa.string(): "sc:Text", pa.float64(): "cr:Float64", pa.int32(): "cr:Int32", pa.int64(): "cr:Int64"}
_SPLIT_TERMS = {"train": "cr:TrainingSplit", "valid": "cr:ValidationSplit", "test": "cr:TestSplit"}
_MEANINGS = {
    "id": "the segment",
    "shard": "number of the file under shards/, -1 if there are no codes",
    "offset": "first frame within the shard",
    "frames": "length in frames of the codec",
    "captions": "texts that describe it",
    "tags": "category---name, such as genre---rock",
    "split": "train, valid or test; no track and no known artist is in two of them",
    "licence": "SPDX identifier of the work's licence",
    "licence_url": "the licence's text",
    "evidence": "where the licence is stated",
    "title": "of the work",
    "author": "of the work",
    "source_url": "where the work was published",
    "modifications": "what was done to the work",
    "content_hash": "sha256 of the sound",
    "duration": "seconds",
    "audio": "path of the sound inside the store",
    "loudness": "of the sound, in LUFS",
    "truth": "JSON: what is known for certain, such as tempo and key",
    "track": "the work that it was cut from",
    "artist": "identity of the artist across data sets",
    "work": "identity of the recording across data sets",
}


def write_croissant(store: Store) -> Path:
    """Write the store's croissant.json and return its path. ATTRIBUTION.csv is described if it is there."""
    path = store.path / FILE
    write_text(path, json.dumps(_described(store), indent=2, ensure_ascii=False) + "\n")
    return path


def _described(store: Store) -> dict[str, Any]:
    name, made = store.path.resolve().name, datetime.fromtimestamp((store.path / "store.json").stat().st_mtime, UTC)
    title = f"{name}: {len(store)} segments of music"
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": name,
        "description": _summary(store),
        "license": _licences(store),
        "url": "./",
        "creator": {"@type": "sc:Organization", "name": "the authors that ATTRIBUTION.csv names"},
        "datePublished": made.date().isoformat(),
        "version": f"1.0.0+{store.fingerprint}",
        "keywords": ["music", "text-to-music"],
        "citeAs": f"@misc{{{name}, title = {{{title}}}, year = {{{made.year}}}, note = {{Prepared with ssmttm "
        f"{ssmttm.__version__}; store {store.fingerprint}}}}}",
        "isLiveDataset": False,
        "distribution": _distribution(store),
        "recordSet": [_splits(store), _segments(store)],
    }


def _summary(store: Store) -> str:
    info = store.info
    splits = ", ".join(f"{split} {info['counts'][split]} ({info['hours'][split]:g} h)" for split in SPLITS)
    kept = "their sound, " if store.manifest["audio"].null_count < len(store) else ""
    codes = f"codes of {info['codec']['name']}" if info["codec"] else "no codes"
    text = f"caption embeddings of {info['text']['name']}" if info["text"] else "no caption embeddings"
    works = "; ".join(f"{licence} {count}" for licence, count in info["licences"].items())
    return (
        f"{len(store)} segments of music with captions and tags: {splits}. It holds {kept}{codes} and {text}. "
        f"Each work has its own licence, which ATTRIBUTION.csv and the manifest state; segments by licence: {works}."
    )


def _licences(store: Store) -> list[str]:
    return sorted(filter(None, pc.unique(store.manifest["licence_url"]).to_pylist()))


def _distribution(store: Store) -> list[dict[str, Any]]:
    described = store.info["files"] | {"ATTRIBUTION.csv": None, "store.json": None}
    single = {"manifest.parquet": "application/x-parquet", "ATTRIBUTION.csv": "text/csv",
              "store.json": "application/json"}  # fmt: skip
    sets = {"audio": ("audio/flac", ["audio/*.flac", "audio/*/*.flac"]),
            "shards": ("application/octet-stream", ["shards/*.safetensors"]),
            "text": ("application/octet-stream", ["text/*.safetensors"])}  # fmt: skip
    objects = [
        _file(store, name, form, described[name]) for name, form in single.items() if (store.path / name).is_file()
    ]
    return objects + [
        {"@type": "cr:FileSet", "@id": name, "name": name, "encodingFormat": form, "includes": includes}
        for name, (form, includes) in sets.items()
        if (store.path / name).is_dir()
    ]


def _file(store: Store, name: str, form: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    path = store.path / name
    entry = entry or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{entry['bytes']} B",
        "encodingFormat": form,
        "sha256": entry["sha256"],
    }


def _splits(store: Store) -> dict[str, Any]:
    """The splits with how much is in them; an enumeration that the segments refer to."""
    counts, hours = store.info["counts"], store.info["hours"]
    types = {"name": "sc:Text", "url": "sc:URL", "segments": "sc:Integer", "hours": "sc:Float"}
    rows = [{"name": split, "url": _SPLIT_TERMS[split], "segments": counts[split], "hours": hours[split]}
            for split in SPLITS]  # fmt: skip
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "dataType": "cr:Split",
        "key": {"@id": "splits/name"},
        "field": [
            {"@type": "cr:Field", "@id": f"splits/{name}", "name": name, "dataType": type_}
            for name, type_ in types.items()
        ],
        "data": [{f"splits/{name}": value for name, value in row.items()} for row in rows],
    }


def _segments(store: Store) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "segments",
        "name": "segments",
        "description": "the manifest: one record a segment",
        "key": {"@id": "segments/id"},
        "field": [_field(column) for column in store.manifest.schema],
    }


def _field(column: pa.Field) -> dict[str, Any]:
    many = pa.types.is_list(column.type)
    field = {
        "@type": "cr:Field",
        "@id": f"segments/{column.name}",
        "name": column.name,
        "description": _MEANINGS.get(column.name, column.name),
        "dataType": _TYPES.get(column.type.value_type if many else column.type, "sc:Text"),
        "source": {"fileObject": {"@id": "manifest.parquet"}, "extract": {"column": column.name}},
    }
    if many:
        field |= {"isArray": True, "arrayShape": "-1"}
    if column.name == "split":
        field |= {"dataType": ["sc:Text", "cr:Split"], "references": {"field": {"@id": "splits/name"}}}
    return field
