"""Reading of WebDataset archives from untrusted sources.

A sample is the files of one key, in any order: audio as `KEY.flac` or another format, metadata as `KEY.json`, a caption
as `KEY.txt`. A key may have dots; letter case and Unicode normal form do not matter.

Formats: github.com/webdataset/webdataset, POSIX.1-2001 tar.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.paths import check_name, inside, printable
from data_prep.shard_task import Counts
from data_prep.sources.archives.tar_stream import BadArchive, Bounds, Member, members
from data_prep.sources.fields import field_of, match_key, one_licence, one_split, split_texts, stated_licences
from data_prep.sources.records import joined_values
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

_ONLY_JSON = "the sample has JSON but no audio"
ITEMS_FILE = "items.jsonl"
AUDIO_EXTENSIONS = {
    "wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "caf", "w64", "m4a", "mp4", "aac", "wma",
    "wv", "ape", "tta", "webm", "mka",
}  # fmt: skip
TEXT_EXTENSIONS = {"txt", "caption"}


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits of the audio and text files in an archive, and bounds of the archive."""

    audio_bytes: int = 4 << 30
    text_bytes: int = 1 << 20
    bounds: Bounds = field(default_factory=Bounds)


def read_archives(path: Path, out: Path, limits: ArchiveLimits = ArchiveLimits()) -> Iterator[Track | Rejection]:
    """Read archives once from start to end, write their audio below `out`, and yield a track per sample.

    JSON keys: caption, captions or text; licence, in any spelling; title; author or artist; source_url or
    url; tags; split; id. `.txt` and `.caption` are captions. Other files of a sample are ignored. Rejected are unsafe
    names, links and devices, several licences, samples without audio or with invalid JSON, and damaged or large files
    and archives, of which the rest is lost.

    Args:
        path: an archive (`.tar`, `.tar.gz`, `.tgz`), or a folder with archives at any depth.
        out: root of the tracks' paths, which are `ARCHIVE/KEY.EXTENSION`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for archive in find_archives(path):
        name = archive.name if archive == path else archive.relative_to(path).as_posix()
        yield from _Archive(archive, name, out, limits).tracks()


def find_archives(path: Path) -> list[Path]:
    """An archive, or the archives of a folder at any depth, sorted. Raises UserError if there is none."""
    archives = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_archive(file))
    if not archives:
        raise UserError(f"no archive (.tar, .tar.gz, .tgz) in {path}")
    return archives


def unpack_shard(archive: Path, folder: Path) -> Counts:
    """The stage `unpack`: write the audio of an archive, and its tracks and rejections, into a shard's folder."""
    items = list(read_archives(archive, folder))
    with open(folder / ITEMS_FILE, "w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps({type(item).__name__: asdict(item)}) + "\n")
    tracks = sum(isinstance(item, Track) for item in items)
    return {"tracks": tracks, "rejected": len(items) - tracks}


def read_unpacked(folder: Path) -> Iterator[Track | Rejection]:
    """The items of a shard of `unpack`, with paths relative to the stage's folder."""
    with open(folder / ITEMS_FILE, encoding="utf-8") as file:
        for line in file:
            ((kind, fields),) = json.loads(line).items()
            if kind == "Rejection":
                yield Rejection(**fields)
            else:
                texts = {name: tuple(fields[name]) for name in ("captions", "tags")}
                yield Track(**{**fields, **texts, "path": f"{folder.name}/{fields['path']}"})


def read_all_unpacked(folders: Sequence[Path]) -> Iterator[Track | Rejection]:
    """The items of all shards. While JSON of one archive has no audio, tracks of any without a licence are rejected."""
    orphan = next((item.item for folder in folders for item in read_unpacked(folder)
                   if isinstance(item, Rejection) and item.reason == _ONLY_JSON), None)  # fmt: skip
    for folder in folders:
        for item in read_unpacked(folder):
            if orphan is not None and isinstance(item, Track) and not item.licence:
                reason = f"it states no licence, and {orphan}.json belongs to no audio: name them alike, in one archive"
                yield Rejection(item.id, "licence", reason)
            else:
                yield item


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()


class _Archive:
    """An archive. `name` is used in messages and, without extension, as the folder of its audio below `out`."""

    def __init__(self, path: Path, name: str, out: Path, limits: ArchiveLimits) -> None:
        self._path, self._name, self._out, self._limits = path, name, out, limits
        self._folder = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name, flags=re.IGNORECASE)

    def tracks(self) -> Iterator[Track | Rejection]:
        samples: dict[str, _Sample] = {}
        damage: BadArchive | None = None
        sample: _Sample | None = None
        try:
            for member in self._members():
                key, extension = _split(member.name)
                try:
                    _check(member)
                except Rejected as error:
                    yield error.for_item(f"{self._name}:{printable(member.name)}")
                    if match_key(key) in samples or extension in TEXT_EXTENSIONS | {"json"}:
                        sample = self._sample(samples, key)
                        sample.rejected = sample.rejected or error
                    continue
                if extension:
                    sample = self._sample(samples, key)
                    sample.add(extension, member)
        except BadArchive as error:
            damage = error
            if sample is not None:
                sample.rejected = sample.rejected or error
        orphan = next((sample for sample in samples.values() if sample.metadata is not None and not sample.audio), None)
        for sample in samples.values():
            if sample.metadata is None and sample.rejected is None:
                if damage is not None:
                    sample.rejected = Rejected("unreadable", "its JSON may be in the part of the archive that is lost")
                elif orphan is not None:
                    reason = f"it has no JSON, and {printable(orphan.key)}.json belongs to no audio: name them alike"
                    sample.rejected = Rejected("metadata", reason)
            yield sample.result()
        if damage is not None:
            yield damage.for_item(self._name)

    def _sample(self, samples: dict[str, "_Sample"], key: str) -> "_Sample":
        new = _Sample(key, f"{self._name}:{printable(key)}", self._folder, self._out, self._limits)
        return samples.setdefault(match_key(key), new)

    def _members(self) -> Iterator[Member]:
        try:
            with open(self._path, "rb") as file:
                yield from (member for member in members(file, self._limits.bounds) if member.kind != "folder")
        except OSError as error:
            raise BadArchive("unreadable", f"the archive cannot be read ({error.strerror})") from error


@dataclass
class _Sample:
    """A sample read so far. `item` names it in rejections; `folder` is that of its audio, below `out`."""

    key: str
    item: str
    folder: str
    out: Path
    limits: ArchiveLimits
    audio: str = ""  # path below `out`
    metadata: dict[str, Any] | None = None
    captions: list[str] = field(default_factory=list)
    rejected: Rejected | None = None

    def add(self, extension: str, member: Member) -> None:
        """Read a file of the sample; errors are kept for `result`. Raises BadArchive."""
        try:
            if extension in AUDIO_EXTENSIONS:
                self._write_audio(extension, member)
            elif extension in TEXT_EXTENSIONS:
                self.captions.append(self._read_text(member))
            elif extension == "json":
                self._add_metadata(self._read_text(member))
        except BadArchive:
            raise
        except Rejected as error:
            self.rejected = self.rejected or error

    def result(self) -> Track | Rejection:
        """The track, or its rejection; the audio of a rejected one is removed."""
        if self.rejected is None and not self.audio:
            self.rejected = Rejected("missing", _ONLY_JSON if self.metadata is not None else "the sample has no audio")
        if self.rejected is None:
            try:
                return self._track(self.metadata or {})
            except Rejected as error:
                self.rejected = error
        if self.audio:
            (self.out / self.audio).unlink()
        return self.rejected.for_item(self.item)

    def _track(self, metadata: dict[str, Any]) -> Track:
        captions = [text for name in ("captions", "caption", "text") for text in _texts(metadata.get(name))]
        tags = metadata.get("tags")
        fields = joined_values((field_of(name), value) for name, value in metadata.items())
        licence, evidence = one_licence(dict.fromkeys(stated_licences(fields), f"{self.item}.json"))
        split = one_split(split_texts(fields.get("split")))
        return Track(
            id=_first(metadata, "id") or self.audio, path=self.audio, licence=licence,
            title=_first(metadata, "title"), author=_first(metadata, "author", "artist"),
            source_url=_first(metadata, "source_url", "url"), evidence=evidence,
            captions=tuple(dict.fromkeys([*captions, *filter(None, map(str.strip, self.captions))])),
            tags=tuple(_texts(tags.split(",") if isinstance(tags, str) else tags)),
            split=split,
        )  # fmt: skip

    def _write_audio(self, extension: str, member: Member) -> None:
        if self.audio:
            raise Rejected("metadata", "the sample has several audio files")
        if self.rejected is not None:
            return
        if member.size > self.limits.audio_bytes:
            raise Rejected("limit", f"it is larger than {self.limits.audio_bytes} bytes")
        name = f"{self.folder}/{self.key}.{extension}"
        path = inside(self.out, name)
        part = path.with_name(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                for chunk in member.chunks():
                    file.write(chunk)
            part.replace(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
                raise Rejected("metadata", f"its name is not a valid file name ({error.strerror})") from error
            raise
        finally:
            with suppress(OSError):
                part.unlink()
        self.audio = name

    def _read_text(self, member: Member) -> str:
        if member.size > self.limits.text_bytes:
            raise Rejected("limit", f"its text is larger than {self.limits.text_bytes} bytes")
        try:
            return b"".join(member.chunks()).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Rejected("metadata", "its text is not UTF-8") from error

    def _add_metadata(self, text: str) -> None:
        if self.metadata is not None:
            raise Rejected("metadata", "the sample has several JSON files")
        try:
            self.metadata = json.loads(text, object_pairs_hook=joined_values)
        except (ValueError, RecursionError) as error:
            raise Rejected("metadata", "its JSON is invalid") from error
        if not isinstance(self.metadata, dict):
            raise Rejected("metadata", "its JSON is not an object")


def _check(member: Member) -> None:
    """Raises Rejected for links and unsafe names."""
    if member.kind != "file":
        raise Rejected("unreadable", f"it is a {member.kind}, not a file")
    check_name(member.name)


def _split(path: str) -> tuple[str, str]:
    """Key and lower-case extension; no extension for files to ignore."""
    folder, slash, name = "/".join(part for part in path.split("/") if part not in ("", ".")).rpartition("/")
    key, _, extension = name.rpartition(".")
    known = extension.lower() in AUDIO_EXTENSIONS | TEXT_EXTENSIONS | {"json"}
    if known and os.path.splitext(key)[1][1:].lower() in AUDIO_EXTENSIONS:
        key = os.path.splitext(key)[0]  # song.flac.json
    return f"{folder}{slash}{key}", extension.lower() if known and key and not key.startswith(".") else ""


def _first(metadata: dict[str, Any], *names: str) -> str:
    """The first non-empty text."""
    return next((text for name in names for text in _texts(metadata.get(name))[:1]), "")


def _texts(value: object) -> list[str]:
    """The non-empty texts of a text or a list; lone surrogates are replaced."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = [text.encode("utf-8", "replace").decode().strip() for text in values if isinstance(text, str)]
    return [text for text in texts if text]
