"""A folder of audio files, with metadata in a table or in sidecar files."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.paths import printable
from data_prep.sources.fields import (
    FIELDS,
    JOINED,
    annotations_of,
    field_of,
    match_key,
    one_licence,
    one_split,
    split_texts,
    stated_licences,
)
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
ROOT/captions.csv, metadata.csv          columns path (or file_name; relative to ROOT, required), caption (or text,
                                         prompt ...), licence, title, author, source_url, artist, tags, split, and as
                                         controls bpm, key ("D minor"), metre ("3/4"), bars (times of the bar lines in
                                         seconds); several lines per path: several captions
ROOT/captions.jsonl, metadata.jsonl      instead: the same keys; caption and tags may be lists
ROOT/**/song.txt, song.json              beside song.wav: one caption per line; the same keys
Give a table of another name as --index. Folders of ROOT such as train, valid and test are read as splits."""

_TABLES, _OTHER_TABLES = (".csv", ".jsonl", ".ndjson"), (".tsv", ".json", ".parquet", ".xlsx", ".xls", ".ods")
_TABLE_STEMS = ("captions", "metadata")
_SINGLE = ("title", "author", "source_url", "artist")
_SHOWN = 3  # rows in an error
_FORMS = {"bpm": "write beats per minute", "key": "write a tonic and a mode, such as 'D minor'",
          "metre": "write one such as 3/4", "bars": "write rising seconds, with blanks between them"}  # fmt: skip
_log = logging.getLogger(__name__)


def tracks(root: Path, index: Path | None = None, allow_unmatched: bool = True) -> Iterator[Track | Rejection]:
    """Audio files under `root` in the order of their paths.

    Args:
        index: a table of another name, .csv or .jsonl.
        allow_unmatched: reject rows that are unusable or match no file, and go on; else they are an error, as a licence
            that they state would be lost.

    Raises:
        UserError: no folder, no audio file, an unreadable table, two tables, or columns of another meaning.
    """
    check_root(root)
    table, split_of = _Table(root, index), _split_folders(root)
    unread: dict[str, list[str]] = {}
    unmatched = []
    for rejection in table.read():
        unmatched.append(rejection)
        yield rejection
    empty = True
    for found in folders(root):
        if isinstance(found, Rejection):
            yield found
            continue
        inside, names = found
        prefix, sidecars = f"{inside}/" if inside else "", _Sidecars(names)
        if inside and not allow_unmatched:
            _check_no_table(root, inside, names, index)
        for name in names:
            if is_audio(name):
                empty = False
                yield _item(root, prefix + name, table, sidecars, split_of, unread)
        if not allow_unmatched:
            unmatched.extend(_unmatched_sidecars(root, prefix, sidecars))
    for path, error in table.other_paths(root):
        empty = False
        item = _item(root, path, table, _Sidecars(()), split_of, unread) if error is None else error.for_item(path)
        if error is not None:
            unmatched.append(error.for_item(path))
        yield item
    for name, values in unread.items():
        _log.warning(
            "%s: the %s of %d tracks is not read, such as %r: %s", root, name, len(values), values[0], _FORMS[name]
        )
    if empty:
        raise UserError(f"no audio file in {root} (.flac, .mp3, .wav ...): give the folder of the music")
    if unmatched and not allow_unmatched:
        shown = "; ".join(f"{printable(item.item)}: {item.reason}" for item in unmatched[:_SHOWN])
        more = f"; and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
        raise UserError(f"{len(unmatched)} entries of the metadata in {root} reach no audio file ({shown}{more}): "
                        "correct them, or give --allow-unmatched to go on without them")  # fmt: skip


@dataclass
class _Metadata:
    """Metadata of a file. Captions, tags, licences and splits accumulate; later values of other keys replace earlier
    ones."""

    captions: dict[str, None] = field(default_factory=dict)
    tags: dict[str, None] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)  # where each is stated
    splits: dict[str, None] = field(default_factory=dict)
    single: dict[str, str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # annotations that cannot be read, by field

    def add(self, values: dict[str, Any], where: str) -> None:
        """Add the record at `where`. Raises Rejected for values of a wrong type."""
        self.captions |= dict.fromkeys(texts(values.get("caption")))
        self.tags |= dict.fromkeys(_tags(values.get("tags")))
        self.licences |= dict.fromkeys(stated_licences(values), where)
        self.splits |= dict.fromkeys(split_texts(values.get("split")))
        self.single |= {name: written for name in _SINGLE if (written := text(values.get(name)))}
        truth, unread = annotations_of(values)
        self.truth |= truth
        self.unread |= unread


class _Table:
    """The folder's table, with an index of the records of each path."""

    def __init__(self, root: Path, index: Path | None) -> None:
        found = [index] if index else _tables(root)
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1].name} both describe the folder: keep one, or give it as --index")
        if index and not index.is_file():
            raise UserError(f"no file {index}: give a table of captions as --index, .csv or .jsonl")
        self._root = root
        self._table: CsvTable | JsonLines | None = None
        if found and found[0].suffix.lower() in (".jsonl", ".json", ".ndjson"):
            self._table = JsonLines(found[0], field_of)
        elif found:
            self._table = CsvTable(found[0], ("path",), field_of, JOINED)
        self._positions = Positions()
        self._matched: set[int] = set()  # keys of records whose path is written in another way than the file's

    def read(self) -> Iterator[Rejection]:
        """Index the records; yield those that cannot be used. Raises UserError for columns of another meaning."""
        usable = 0
        names: dict[str, None] = {}
        for record, path in self._records():
            if isinstance(path, Rejected):
                if path.reason.endswith(NOT_UTF8) and self._table:
                    raise UserError(f"{self._table.path} {path.reason}: save it as UTF-8")
                yield path.for_item(self._where(record.line))
            elif path:
                usable += 1
                names |= dict.fromkeys(record.values) if len(names) < 1000 else {}
                self._positions.add(hash(match_key(path)), record.offset, record.line)
            elif any(record.values.values()):
                yield Rejection(self._where(record.line), "metadata", "the line names no file")
        if isinstance(self._table, JsonLines) and not usable:
            raise UserError(f"{self._table.path} has no line with a JSON object that has a path or file_name")
        self._check_names(names)

    def _check_names(self, names: Iterable[str]) -> None:
        unused = [printable(name[:40]) for name in names if name and name not in FIELDS]
        if not unused:
            return
        assert self._table is not None
        shown = ", ".join(repr(name) for name in unused[:20])
        if FIELDS.isdisjoint(set(names) - {"path", "id"}):
            raise UserError(f"{self._table.path}: the columns {shown} are not understood: name them caption, licence, "
                            "title, author, source_url, artist, tags or split")  # fmt: skip
        _log.warning("%s: the columns %s are not used", self._table.path, shown)

    def metadata(self, path: str) -> _Metadata:
        """The metadata of a file. Raises Rejected for values of a wrong type."""
        metadata = _Metadata()
        key = hash(match_key(path))
        for offset, line in self._positions.find(key):
            assert self._table is not None
            values = self._table.at(offset)
            written = _path(values)
            if written != path:
                if match_key(written) != match_key(path) or _is_file(self._root, written):
                    continue
                self._matched.add(key)
            metadata.add(values, self._where(line))
        return metadata

    def other_paths(self, root: Path) -> Iterator[tuple[str, Rejected | None]]:
        """The paths that are no visible audio file under `root`, each once, with an error if they cannot be used."""
        for record, path in self._records():
            if isinstance(path, Rejected) or not path:
                continue
            key = hash(match_key(path))
            if self._positions.first(key) != record.offset:
                continue
            try:
                if os.path.isfile(os.path.join(root, within(path))):
                    hidden = any(part.startswith(".") for part in path.split("/"))
                    if hidden or not is_audio(path):
                        yield path, None
                elif key not in self._matched:
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


class _Sidecars:
    """The .json and .txt files of a folder, found by the name of an audio file."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[str]] = {}
        self.unused: set[str] = set()  # .json files that were not found yet
        for name in names:
            if (ending := os.path.splitext(name)[1].lower()) in (".json", ".txt"):
                self._names.setdefault(match_key(name), []).append(name)
                self.unused |= {name} if ending == ".json" else set()

    def of(self, audio: str, ending: str) -> list[str]:
        """Those of `song.wav`: song.json and song.wav.json, the exact name before others of the same match key."""
        found = []
        for wanted in (os.path.splitext(audio)[0] + ending, audio + ending):
            same = self._names.get(match_key(wanted), [])
            found.extend([wanted] if wanted in same else same)
        self.unused.difference_update(found)
        return found


def _tables(root: Path) -> list[Path]:
    """The tables of a folder, in any letter case. Raises UserError for one in a format that is not read."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
    audio_stems = {match_key(os.path.splitext(name)[0]) for name in names if is_audio(name)}
    found = []
    for name in names:
        stem, ending = (part.lower() for part in os.path.splitext(name))
        if stem in _TABLE_STEMS and ending in _TABLES:
            found.append(root / name)
        elif stem in _TABLE_STEMS and ending in _OTHER_TABLES and stem not in audio_stems:
            raise UserError(f"{root / name} is in a format that is not read: save it as .csv or .jsonl")
    return found


def _split_folders(root: Path) -> dict[str, str]:
    """The split of each folder of `root` named as one, if train and another split are among them."""
    found = {}
    for entry in os.scandir(root):
        with suppress(Rejected):
            if entry.is_dir() and (split := one_split([entry.name])):
                found[entry.name] = split
    if "train" not in found.values() or len(set(found.values())) < 2:
        return {}
    _log.warning("%s: the folders %s are read as splits", root, ", ".join(sorted(map(printable, found))))
    return found


def _check_no_table(root: Path, inside: str, names: list[str], index: Path | None) -> None:
    for name in names:
        stem, ending = (part.lower() for part in os.path.splitext(name))
        table = root / inside / name
        if stem in _TABLE_STEMS and ending in _TABLES and (index is None or table.resolve() != index.resolve()):
            raise UserError(f"{table} is not read, as it is in a folder below --root: give its folder as --root, or "
                            f"one table of the whole in {root}, or --allow-unmatched to go on without it")  # fmt: skip


def _unmatched_sidecars(root: Path, prefix: str, sidecars: _Sidecars) -> Iterator[Rejection]:
    """The .json files that state a licence and belong to no audio file."""
    for name in sorted(sidecars.unused):
        try:
            licences = stated_licences(parse_object(_read(root / f"{prefix}{name}"), field_of))
        except Rejected:
            continue
        if licences:
            yield Rejection(f"{prefix}{name}", "missing", "it states a licence, but there is no audio file of its name")


def _is_file(root: Path, path: str) -> bool:
    return "\0" not in path and os.path.isfile(os.path.join(root, path))


def _path(values: dict[str, Any]) -> str:
    """The path of a record, normalised if it is valid."""
    written = text(values.get("path"))
    try:
        return within(written) if written else ""
    except Rejected:
        return written


def _item(
    root: Path, path: str, table: _Table, sidecars: _Sidecars, split_of: Mapping[str, str],
    unread: dict[str, list[str]],
) -> Track | Rejection:  # fmt: skip
    """The track of a file.

    Args:
        sidecars: those of its folder.
        split_of: the splits by the first folder's name.
        unread: annotations that cannot be read, by field; those of this file are added.
    """
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Rejection(path.encode("utf-8", "replace").decode(), "metadata", "its name is not UTF-8: rename it")
    files = {ending: sidecars.of(os.path.basename(path), ending) for ending in (".json", ".txt")}
    try:
        metadata = table.metadata(path)
        _add_sidecars(root / os.path.dirname(path), metadata, files)
        licence, evidence = one_licence(metadata.licences)
        split = one_split([*metadata.splits, split_of.get(path.partition("/")[0], "")])
    except Rejected as error:
        return error.for_item(path)
    for name, value in metadata.unread.items():
        unread.setdefault(name, []).append(value)
    single = metadata.single
    return Track(
        id=path, path=path, licence=licence,
        title=single.get("title") or os.path.splitext(os.path.basename(path))[0], author=single.get("author", ""),
        source_url=single.get("source_url", ""), artist=single.get("artist", ""), evidence=evidence,
        captions=tuple(metadata.captions), tags=tuple(metadata.tags), split=split,
        truth=json.dumps(metadata.truth) if metadata.truth else "",
    )  # fmt: skip


def _add_sidecars(folder: Path, metadata: _Metadata, files: dict[str, list[str]]) -> None:
    for name in files[".json"]:
        try:
            metadata.add(parse_object(_read(folder / name), field_of), name)
        except Rejected as error:
            raise Rejected("metadata", f"{name} {error.reason}") from error
    for name in files[".txt"]:
        try:
            lines = _read(folder / name).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Rejected("metadata", f"{name} is not UTF-8 text") from error
        metadata.add({"caption": lines}, name)


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
