"""WebDataset archives: a store out as tars, and tars of strangers in as a source.

A sample is a run of files whose names are the same up to the first dot: `KEY.flac` or another sound, `KEY.json` with
what is known of it, `KEY.txt` with a caption. Formats: github.com/webdataset/webdataset, and tar of POSIX.1-2001.

Shapes: K codebooks, T frames.
"""

import errno
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data_prep.paths import check_name, inside, printable
from data_prep.shard_task import Counts
from data_prep.sources.archives.tar_stream import BadArchive, Bounds, Member, members
from data_prep.track import Rejected, Rejection, Track
from ssmttm.data.store import SPLITS, Store
from ssmttm.errors import UserError
from ssmttm.files import file_sha256, new_folder

INDEX, ITEMS_FILE = "dataset.json", "items.jsonl"
SOUNDS = {
    "wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "caf", "w64", "m4a", "mp4", "aac", "wma",
    "wv", "ape", "tta", "webm", "mka",
}  # fmt: skip
TEXTS = {"txt", "caption"}
_LONGEST_KEY = 100  # letters
_Files = list[tuple[str, bytes]]  # names and contents
_PLACE = {"shard", "offset", "audio"}  # columns that tell of the store, not of the segment


def export(store: Store, out: Path, shard_bytes: int = 1 << 30) -> list[Path]:
    """Write a store as WebDataset archives, the same bytes for the same store.

    A segment becomes `KEY.flac` (its sound as the store keeps it), `KEY.json` (its row of the manifest) and, where it
    has codes, `KEY.codes.npy` (uint16 [K, T]). KEY is its id; what is no letter, digit, `-` or `_` is percent-encoded,
    and what is too long ends in a hash. Beside the archives lie dataset.json (codec, rate, counts; each archive's
    sha256) and ATTRIBUTION.csv.

    Args:
        out: a new folder.
        shard_bytes: of an archive, at most, unless a single segment is larger.

    Returns:
        The archives.

    Raises:
        UserError: `out` is there already or cannot be written, or the store lacks a file.
    """
    with new_folder(out) as aside:
        names = _write_all(store, aside, shard_bytes)
        shards = [{"name": name, "sha256": file_sha256(aside / name)} for name in names]
        known = {name: store.info.get(name) for name in ("codec", "sample_rate", "counts", "hours")}
        (aside / INDEX).write_text(json.dumps({**known, "shards": shards}, indent=2) + "\n", encoding="utf-8")
        with suppress(FileNotFoundError):
            (aside / "ATTRIBUTION.csv").write_bytes((store.path / "ATTRIBUTION.csv").read_bytes())
    return [out / name for name in names]


def _write_all(store: Store, folder: Path, shard_bytes: int) -> list[str]:
    names = []
    for index, part in itertools.groupby(_numbered(_samples(store), shard_bytes - 10_240), key=itemgetter(0)):
        names.append(f"shard-{index:06d}.tar")
        with tarfile.open(folder / names[-1], "x", format=tarfile.PAX_FORMAT) as archive:
            for name, data in itertools.chain.from_iterable(sample for _, sample in part):
                entry = tarfile.TarInfo(name)  # no time, no owner, mode 0644
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return names


def _numbered(samples: Iterable[_Files], shard_bytes: int) -> Iterator[tuple[int, _Files]]:
    """Each sample with the number of its archive."""
    number, left = 0, shard_bytes
    for sample in samples:
        size = sum(1024 + len(data) for _, data in sample)  # a header each, and what fills the last block
        if size > left and left < shard_bytes:
            number, left = number + 1, shard_bytes
        left -= size
        yield number, sample


def _samples(store: Store) -> Iterator[_Files]:
    """Names and contents of each segment's files."""
    index = 0
    for batch in store.manifest.to_batches():
        for row in batch.to_pylist():
            key = _key(row["id"])
            known = {name: value for name, value in row.items() if name not in _PLACE}
            sample = [(f"{key}.json", json.dumps(known, ensure_ascii=False, sort_keys=True).encode())]
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
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class ArchiveLimits:
    """What is too much of archives.

    Attributes:
        sound_bytes, text_bytes: of one file of them.
        bounds: of one archive.
    """

    sound_bytes: int = 4 << 30
    text_bytes: int = 1 << 20
    bounds: Bounds = field(default_factory=Bounds)


def tracks_from(tars: Path, out: Path, limits: ArchiveLimits = ArchiveLimits()) -> Iterator[Track | Rejection]:
    """Read archives from front to back, put their sound aside under `out`, and give a track for each sample.

    JSON is read for caption, captions or text, licence or license (or licence_url), title, author or artist,
    source_url or url, tags, split and id; `.txt` and `.caption` are captions. Other files of a sample are passed over.

    Args:
        tars: an archive (`.tar`, `.tar.gz`, `.tgz`), or a folder of them, in any depth.
        out: the root of the tracks' paths; a track's file is `ARCHIVE/KEY.EXTENSION` below it.

    Yields:
        In the order of the archives' names: tracks, and what is refused: names that lead outside, links and devices,
        keys that occur twice, samples without sound or with JSON that is none, files and archives beyond a limit or
        damaged. A damaged archive costs what comes after the damage.

    Raises:
        UserError: there is no archive.
    """
    out.mkdir(parents=True, exist_ok=True)
    for archive in archives_of(tars):
        name = archive.name if archive == tars else archive.relative_to(tars).as_posix()
        yield from _Archive(archive, name, out, limits).tracks()


def archives_of(tars: Path) -> list[Path]:
    """An archive, or those in a folder in any depth, by name. Raises UserError if there is none."""
    archives = [tars] if tars.is_file() else sorted(path for path in tars.rglob("*") if _is_archive(path))
    if not archives:
        raise UserError(f"there is no archive at {tars} (.tar, .tar.gz, .tgz)")
    return archives


def unpack(archive: Path, folder: Path) -> Counts:
    """The stage `unpack`: put an archive's sound aside in a shard's folder, and write what is known of it."""
    items = list(tracks_from(archive, folder))
    with open(folder / ITEMS_FILE, "w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps({type(item).__name__: asdict(item)}) + "\n")
    tracks = sum(isinstance(item, Track) for item in items)
    return {"tracks": tracks, "rejected": len(items) - tracks}


def unpacked(folder: Path) -> Iterator[Track | Rejection]:
    """What `unpack` wrote into a shard's folder, with the paths from the stage's folder on."""
    with open(folder / ITEMS_FILE, encoding="utf-8") as file:
        for line in file:
            ((kind, facts),) = json.loads(line).items()
            if kind == "Rejection":
                yield Rejection(**facts)
            else:
                texts = {name: tuple(facts[name]) for name in ("captions", "tags")}
                yield Track(**{**facts, **texts, "path": f"{folder.name}/{facts['path']}"})


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()


class _Archive:
    """One archive. `name` is its path in messages, and without its extension the folder of its sound below `out`."""

    def __init__(self, path: Path, name: str, out: Path, limits: ArchiveLimits) -> None:
        self._path, self._name, self._out, self._limits = path, name, out, limits
        self._folder = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name, flags=re.IGNORECASE)

    def tracks(self) -> Iterator[Track | Rejection]:
        sample: _Sample | None = None
        keys: set[str] = set()
        try:
            for member in self._members():
                try:
                    key, extension = _split(member)
                except Rejected as rejected:
                    yield rejected.of(f"{self._name}:{printable(member.name)}")
                    continue
                if not extension:
                    continue
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample.result()
                    sample = _Sample(key, f"{self._name}:{key}", self._folder, self._out, self._limits)
                    if key in keys:
                        sample.rejected = Rejected("metadata", "its key occurs twice in the archive")
                    keys.add(key)
                sample.add(extension, member)
        except BadArchive as rejected:
            if sample is not None:
                sample.rejected = sample.rejected or rejected
                yield sample.result()
            yield rejected.of(self._name)
        else:
            if sample is not None:
                yield sample.result()

    def _members(self) -> Iterator[Member]:
        try:
            with open(self._path, "rb") as file:
                yield from (member for member in members(file, self._limits.bounds) if member.kind != "folder")
        except OSError as error:
            raise BadArchive("unreadable", f"the archive cannot be read ({error.strerror})") from error


@dataclass
class _Sample:
    """What was read of a sample so far; `item` names it in a refusal, `folder` is that of its sound below `out`."""

    key: str
    item: str
    folder: str
    out: Path
    limits: ArchiveLimits
    sound: str = ""  # path below `out`
    known: dict[str, Any] | None = None
    captions: list[str] = field(default_factory=list)
    rejected: Rejected | None = None

    def add(self, extension: str, member: Member) -> None:
        """Take a file of the sample. What is wrong with it is kept for `result`. Raises BadArchive."""
        try:
            if extension.rpartition(".")[2] in SOUNDS:
                self._put_aside(extension.rpartition(".")[2], member)
            elif extension in TEXTS:
                self.captions.append(self._text(member))
            elif extension == "json":
                self._note(self._text(member))
        except BadArchive:
            raise
        except Rejected as rejected:
            self.rejected = self.rejected or rejected

    def result(self) -> Track | Rejection:
        """The track, or why there is none; then its sound is gone."""
        if self.rejected is None and not self.sound:
            self.rejected = Rejected("missing", "its sample holds no sound")
        if self.rejected is not None:
            if self.sound:
                (self.out / self.sound).unlink()
            return self.rejected.of(self.item)
        return self._track(self.known or {})

    def _track(self, known: dict[str, Any]) -> Track:
        licence = _first(known, "licence", "license", "licence_url", "license_url")
        captions = [text for name in ("captions", "caption", "text") for text in _texts(known.get(name))]
        tags = known.get("tags")
        split = _first(known, "split")
        return Track(
            id=_first(known, "id") or self.sound,
            path=self.sound,
            licence=licence,
            title=_first(known, "title"),
            author=_first(known, "author", "artist"),
            source_url=_first(known, "source_url", "url"),
            evidence=f"{self.item}.json" if licence else "",
            captions=tuple(dict.fromkeys([*captions, *filter(None, map(str.strip, self.captions))])),
            tags=tuple(_texts(tags.split(",") if isinstance(tags, str) else tags)),
            split=split if split in SPLITS else "",
        )

    def _put_aside(self, extension: str, member: Member) -> None:
        if self.sound:
            raise Rejected("metadata", "its sample holds several sounds")
        if self.rejected is not None:
            return
        if member.size > self.limits.sound_bytes:
            raise Rejected("limit", f"it is larger than {self.limits.sound_bytes} bytes")
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
                raise Rejected("metadata", f"no file can have its name ({error.strerror})") from error
            raise
        finally:
            with suppress(OSError):
                part.unlink()
        self.sound = name

    def _text(self, member: Member) -> str:
        if member.size > self.limits.text_bytes:
            raise Rejected("limit", f"its text is larger than {self.limits.text_bytes} bytes")
        try:
            return b"".join(member.chunks()).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Rejected("metadata", "its text is not UTF-8") from error

    def _note(self, text: str) -> None:
        if self.known is not None:
            raise Rejected("metadata", "its sample holds JSON twice")
        try:
            self.known = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Rejected("metadata", "its JSON cannot be read") from error
        if not isinstance(self.known, dict):
            raise Rejected("metadata", "its JSON is no object")


def _split(member: Member) -> tuple[str, str]:
    """Key and lower-case extension of a file's name, empty for hidden files and such that belong to no sample.

    Raises:
        Refused: it is no file, or has a name to beware of.
    """
    if member.kind != "file":
        raise Rejected("unreadable", f"it is no file but a {member.kind}")
    check_name(member.name)
    folder, slash, name = "/".join(part for part in member.name.split("/") if part not in ("", ".")).rpartition("/")
    key, _, extension = name.partition(".")
    return f"{folder}{slash}{key}", extension.lower() if key else ""


def _first(known: dict[str, Any], *names: str) -> str:
    """The first text that is one and not empty."""
    return next((text for name in names for text in _texts(known.get(name))[:1]), "")


def _texts(value: object) -> list[str]:
    """Texts of a text or a list of them, without lone surrogates."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = [text.encode("utf-8", "replace").decode().strip() for text in values if isinstance(text, str)]
    return [text for text in texts if text]
