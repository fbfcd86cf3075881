"""A folder of audio files, with metadata in a table or in sidecar files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.listing import check_root, folders, is_audio, within
from data_prep.sources.records import (
    MAX_LINE,
    NOT_UTF8,
    CsvTable,
    JsonLines,
    Positions,
    good,
    listed,
    open_table,
    parse_object,
    text,
    texts,
)
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

LAYOUT = """\
ROOT/**/song.wav ...                     audio files at any depth; hidden ones are ignored
ROOT/captions.csv                        columns path (relative to ROOT, required), caption, licence, title, author,
                                         source_url, artist, tags, split; several lines per path: several captions
ROOT/captions.jsonl, metadata.jsonl      instead: the same keys; file_name for path; caption and tags may be lists
ROOT/**/song.txt, song.json              beside song.wav: one caption per line; the same keys
Give a table of another name as --index."""

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
ALIASES = {"file_name": "path", "captions": "caption"}
_SPLITS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
           "dev": "valid", "test": "test", "eval": "test", "": ""}  # fmt: skip
_SINGLE = ("licence", "title", "author", "source_url", "artist", "split")


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Audio files under `root` in the order of their paths. `index`: a table of another name, .csv or .jsonl.

    Raises:
        UserError: no folder, no audio file, an unreadable table, or two tables.
    """
    check_root(root)
    table = _Table(root, index)
    yield from table.read()
    empty = True
    for found in folders(root):
        if isinstance(found, Rejection):
            yield found
            continue
        inside, names = found
        prefix, present = f"{inside}/" if inside else "", set(names)
        for name in names:
            if is_audio(name):
                empty = False
                yield _item(root, prefix + name, table, present)
    for path, error in table.other_paths(root):
        empty = False
        yield _item(root, path, table, set()) if error is None else error.for_item(path)
    if empty:
        raise UserError(f"no audio file in {root} (.flac, .mp3, .wav ...): give the folder of the music")


@dataclass
class _Metadata:
    """Metadata of a file. Captions and tags accumulate; later values of other keys replace earlier ones."""

    captions: dict[str, None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    single: dict[str, str] = field(default_factory=dict)
    evidence: str = ""

    def add(self, values: dict[str, Any], where: str) -> None:
        """Add the record at `where`. Raises Rejected for values of a wrong type."""
        self.captions |= dict.fromkeys(texts(values.get("caption")))
        self.tags |= dict.fromkeys(_tags(values.get("tags")))
        stated = {name: written for name in _SINGLE if (written := text(values.get(name)))}
        self.single |= stated
        self.evidence = where if "licence" in stated else self.evidence


class _Table:
    """The folder's table, with an index of the records of each path."""

    def __init__(self, root: Path, index: Path | None) -> None:
        found = [index] if index else [root / name for name in TABLES if (root / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1].name} both describe the folder: keep one, or give it as --index")
        if index and not index.is_file():
            raise UserError(f"no file {index}: give a table of captions as --index, .csv or .jsonl")
        self._table: CsvTable | JsonLines | None = None
        if found and found[0].suffix.lower() in (".jsonl", ".json", ".ndjson"):
            self._table = JsonLines(found[0], ALIASES)
        elif found:
            self._table = CsvTable(found[0], ("path",), ALIASES)
        self._positions = Positions()

    def read(self) -> Iterator[Rejection]:
        """Index the records; yield those that cannot be used."""
        usable = 0
        for record, path in self._records():
            if isinstance(path, Rejected):
                if path.reason.endswith(NOT_UTF8) and self._table:
                    raise UserError(f"{self._table.path} {path.reason}: save it as UTF-8")
                yield path.for_item(self._where(record.line))
            elif path:
                usable += 1
                self._positions.add(hash(path), record.offset, record.line)
        if isinstance(self._table, JsonLines) and not usable:
            raise UserError(f"{self._table.path} has no line with a JSON object that has a path or file_name")

    def metadata(self, path: str) -> _Metadata:
        """The metadata of a file. Raises Rejected for values of a wrong type."""
        metadata = _Metadata()
        for offset, line in self._positions.find(hash(path)):
            assert self._table is not None
            values = self._table.at(offset)
            if _path(values) == path:
                metadata.add(values, self._where(line))
        return metadata

    def other_paths(self, root: Path) -> Iterator[tuple[str, Rejected | None]]:
        """The paths that are no visible audio file under `root`, each once, with an error if they cannot be used."""
        for record, path in self._records():
            if isinstance(path, Rejected) or not path or self._positions.first(hash(path)) != record.offset:
                continue
            try:
                if os.path.isfile(os.path.join(root, within(path))):
                    hidden = any(part.startswith(".") for part in path.split("/"))
                    if hidden or not is_audio(path):
                        yield path, None
                else:
                    yield path, Rejected("missing", f"{self._where(record.line)} names it, but there is no such file")
            except Rejected as error:
                yield path, error

    def _records(self) -> Iterator[tuple[Any, str | Rejected]]:
        for record in self._table or ():
            try:
                values = good(record.values)
                _Metadata().add(values, "")
                yield record, _path(values)
            except Rejected as error:
                yield record, error

    def _where(self, line: int) -> str:
        assert self._table is not None
        return f"{self._table.path.name} line {line}"


def _path(values: dict[str, Any]) -> str:
    """The path of a record, normalised if it is valid."""
    written = text(values.get("path"))
    try:
        return within(written) if written else ""
    except Rejected:
        return written


def _item(root: Path, path: str, table: _Table, siblings: set[str]) -> Track | Rejection:
    """The track of a file; `siblings` are the names of the files in its folder."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Rejection(path.encode("utf-8", "replace").decode(), "metadata", "its name is not UTF-8: rename it")
    try:
        metadata = table.metadata(path)
        _add_sidecars(root, path, metadata, siblings)
        split = metadata.single.get("split", "").lower()
        if split not in _SPLITS:
            raise Rejected("metadata", f"its split {split[:40]!r} is not train, valid or test")
    except Rejected as error:
        return error.for_item(path)
    single = metadata.single
    return Track(
        id=path, path=path, licence=single.get("licence", ""),
        title=single.get("title") or os.path.splitext(os.path.basename(path))[0], author=single.get("author", ""),
        source_url=single.get("source_url", ""), artist=single.get("artist", ""), evidence=metadata.evidence,
        captions=tuple(metadata.captions), tags=tuple(metadata.tags), split=_SPLITS[split],
    )  # fmt: skip


def _add_sidecars(root: Path, path: str, metadata: _Metadata, siblings: set[str]) -> None:
    stem = os.path.splitext(path)[0]
    name = os.path.basename(stem)
    if f"{name}.json" in siblings:
        try:
            metadata.add(parse_object(_read(root / f"{stem}.json"), ALIASES), f"{name}.json")
        except Rejected as error:
            raise Rejected("metadata", f"{name}.json {error.reason}") from error
    if f"{name}.txt" in siblings:
        try:
            lines = _read(root / f"{stem}.txt").decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Rejected("metadata", f"{name}.txt is not UTF-8 text") from error
        metadata.add({"caption": lines}, f"{name}.txt")


def _read(file: Path) -> bytes:
    try:
        with open_table(file) as opened:
            data = opened.read(MAX_LINE + 1)
    except UserError as error:
        raise Rejected("metadata", f"its {file.name} cannot be read") from error
    if len(data) > MAX_LINE:
        raise Rejected("metadata", f"its {file.name} is longer than {MAX_LINE} bytes")
    return data


def _tags(value: Any) -> list[str]:
    """Tags from a JSON list, a Python list as text, or words separated by commas or semicolons."""
    if isinstance(value, str):
        value = listed(value) if value.lstrip().startswith("[") else value.replace(";", ",").split(",")
    return [tag if "---" in tag else f"tag---{tag}" for tag in texts(value)]
