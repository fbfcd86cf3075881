"""MTG-Jamendo (Bogdanov et al. 2019, github.com/MTG/mtg-jamendo-dataset).

The tables are tab-separated with CRLF and one field per tag, so rows differ in length; titles contain single quotation
marks. Only audio_licenses.txt states licences.
"""

import mmap
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.listing import check_root
from data_prep.sources.records import MAX_LINE, NOT_UTF8, Positions, open_table, read_lines
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

LAYOUT = """\
ROOT/audio_licenses.txt                  the licences, from the repository's root
ROOT/data/raw_30s_cleantags.tsv          the tracks (or another table, as --index)
ROOT/data/raw.meta.tsv                   titles and artists (optional: else those of audio_licenses.txt)
ROOT/audio/00/1100.mp3 ...               the audio; also under raw_30s/audio, audio-low or ROOT itself, also .low.mp3
With --index, licences and titles may be in the table's folder or above it, as in the repository."""

HEADER = ("TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION")
_TABLES = ("raw_30s_cleantags.tsv", "raw_30s_cleantags_50artists.tsv", "autotagging.tsv", "raw_30s.tsv", "raw.tsv")
_AUDIO = ("audio", "raw_30s/audio", "raw_30s/audio-low", "audio-low", "raw_30s", "")
_SPLIT = re.compile(r"-(train|validation|test)\.tsv$")
_FIELDS = re.compile(
    r"track_(\d{1,12})\tartist_(\d{1,12})\t[^\t\0]*\t(\d\d/\d{1,12})\.mp3(?:\t[^\t\0]*(?:\t([^\0]*))?)?", re.ASCII
)
_BLOCK = re.compile(rb"(?m)^[ \t]*\d+/(\d{1,12})(?:\.\w+)*\.mp3[ \t]*\r?$")
_ROW = re.compile(rb"(?m)^track_(\d{1,12})\t")
_FROM = b" from Jamendo: "
_MAX_BLOCK = 1 << 11


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Tracks of MTG-Jamendo. `index`: another table of the repository, or its folder splits/split-N for all splits.

    Raises:
        UserError: no table, no audio_licenses.txt or no folder of audio.
    """
    check_root(root)
    tables = _tables(root, index)
    places = [root, root / "data", *tables[0].resolve().parents[:4]]
    licences = Licences(_find_file(places, "audio_licenses.txt"))
    titles = next((Titles(place / "raw.meta.tsv") for place in places if (place / "raw.meta.tsv").is_file()), None)
    audio = Audio(root)
    for table in tables:
        split = _split_name(table)
        for row in read_table(table):
            yield row if isinstance(row, Rejection) else _track(row, audio, licences, titles, split)


class Row(NamedTuple):
    """A row of a table: numeric ids, path without extension, tags `category---name`."""

    track: int
    artist: int
    path: str
    tags: tuple[str, ...]


def read_table(path: Path) -> Iterator[Row | Rejection]:
    """Rows of one of the repository's tables. Raises UserError if the first line is not the header."""
    with open_table(path) as file:
        lines = read_lines(file)
        header = next(lines, b"").removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
        if tuple(header[:MAX_LINE].split(b"\t")[:5]) != tuple(name.encode() for name in HEADER):
            link = f" (it is a link to {header[:80]!r}: give that file)" if header.endswith(b".tsv") else ""
            raise UserError(f"{path} is no table of MTG-Jamendo: its first line is not {' '.join(HEADER)} TAGS{link}")
        for number, line in enumerate(lines, 2):
            if line := line.rstrip(b"\r\n"):
                try:
                    yield _row(line)
                except Rejected as error:
                    yield Rejection(f"{path.name} line {number}", "metadata", f"line {number} {error.reason}")


class Audio:
    """The audio files, in full or low quality, in one of the usual folders under `root`. Raises UserError if none."""

    def __init__(self, root: Path) -> None:
        places = [place for place in _AUDIO if any((root / place / f"{part:02d}").is_dir() for part in range(100))]
        if not places:
            raise UserError(f"no audio in {root}: unpack the archives so that {root}/audio/00 exists")
        self._root = os.fspath(root)
        self._patterns = [(f"{place}/" if place else "", end) for place in places for end in (".mp3", ".low.mp3")]

    def path(self, name: str) -> str | None:
        """The relative path of a track such as `48/948`, or None. The pattern found last is tried first."""
        for pattern in self._patterns:
            path = f"{pattern[0]}{name}{pattern[1]}"
            if os.path.isfile(f"{self._root}/{path}"):
                if pattern is not self._patterns[0]:
                    self._patterns.remove(pattern)
                    self._patterns.insert(0, pattern)
                return path
        return None


class Statement(NamedTuple):
    """An entry of audio_licenses.txt: link (else name) of the licence, line of the work, and where it is."""

    licence: str = ""
    work: bytes = b""
    evidence: str = ""

    def credit(self) -> tuple[str, str, str]:
        """Title, author and link."""
        title, _, url = self.work.decode("utf-8", "replace").strip().partition(_FROM.decode())
        title, author = title.split(" by ") if title.count(" by ") == 1 else (title, "")
        return title, author, url


class Licences:
    """audio_licenses.txt: a block per track, which begins with a line that is its path.

    Blocks are separated by blank lines or `--`. They hold, in any order, the line `TITLE by AUTHOR from Jamendo: LINK`
    and the line `Available under a NAME license: LINK`. A line with " by " twice is not split: all of it is the title.
    """

    def __init__(self, path: Path) -> None:
        self._text, self._positions = _map_file(path), Positions()
        line, previous = 1, 0
        for match in _BLOCK.finditer(self._text):
            line += self._text[previous : match.start()].count(b"\n")
            previous = match.start()
            self._positions.add(int(match[1]), match.end(), line)

    def find(self, track: int) -> Statement:
        """The entry of a track, empty if there is none. Raises Rejected if there are two with different licences."""
        statements = [self._read(offset, line) for offset, line in self._positions.find(track)]
        if len(statements) > 1 and len({statement.licence for statement in statements}) > 1:
            raise Rejected("licence", "audio_licenses.txt states two licences for it")
        return statements[0] if statements else Statement()

    def _read(self, offset: int, line: int) -> Statement:
        licence, work = "", b""
        for part in self._text[offset : offset + _MAX_BLOCK].split(b"\n", 9)[1:9]:
            if _FROM in part:
                work = part
            elif part.lstrip().startswith(b"Available under "):
                licence = _licence(part)
            elif _BLOCK.match(part):
                break
            if licence and work:
                break
        return Statement(licence, work, f"audio_licenses.txt line {line}" if licence else "")


class Titles:
    """raw.meta.tsv: title, artist and link. Some rows have an empty field between title and artist."""

    def __init__(self, path: Path) -> None:
        self._text, self._positions = _map_file(path), Positions()
        for match in _ROW.finditer(self._text):
            self._positions.add(int(match[1]), match.start(), 0)

    def find(self, track: int) -> tuple[str, str, str] | None:
        """Title, artist and link of a track, or None if it is not listed or its row is too short."""
        for offset, _ in self._positions.find(track):
            line = self._text[offset : offset + _MAX_BLOCK].partition(b"\n")[0]
            fields = line.decode("utf-8", "replace").split("\t")
            if len(fields) >= 8:
                title = " ".join(filter(None, fields[3:-4]))
                return title.strip(), fields[-4].strip(), fields[-1].strip()
        return None


def _track(row: Row, audio: Audio, licences: Licences, titles: Titles | None, split: str) -> Track | Rejection:
    name = f"jamendo:{row.track}"
    path = audio.path(row.path)
    if path is None:
        return Rejection(name, "missing", f"there is no file {row.path}.mp3")
    try:
        stated = licences.find(row.track)
    except Rejected as error:
        return error.for_item(name)
    title, author, url = (titles.find(row.track) if titles else None) or stated.credit()
    return Track(
        id=name, path=path, licence=stated.licence, title=title, author=author,
        source_url=url or f"https://www.jamendo.com/track/{row.track}", artist=f"jamendo:artist:{row.artist}",
        work=name, evidence=stated.evidence, tags=row.tags, split=split,
    )  # fmt: skip


def _row(line: bytes) -> Row:
    if len(line) > MAX_LINE:
        raise Rejected("metadata", f"is longer than {MAX_LINE} bytes")
    try:
        found = _FIELDS.fullmatch(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected("metadata", NOT_UTF8) from error
    if found is None:
        raise Rejected("metadata", f"is not a row of {', '.join(HEADER)}, TAGS")
    track, artist, path, tags = found.groups("")
    return Row(int(track), int(artist), path, tuple(filter(None, tags.split("\t"))))


@lru_cache(1024)
def _licence(line: bytes) -> str:
    written = line.decode("utf-8", "replace").strip()
    link = re.search(r"https?://\S+", written)
    if link:
        return link[0].rstrip(".,;")
    name = re.sub(r"^Available under (?:an? |the )?", "", written)
    return re.sub(r"\s*licen[cs]e\s*[:.]*\s*$", "", name, flags=re.IGNORECASE)


def _tables(root: Path, index: Path | None) -> list[Path]:
    if index is None:
        index = next((place / name for name in _TABLES for place in (root / "data", root)
                      if (place / name).is_file()), root / "data" / _TABLES[0])  # fmt: skip
    if index.is_dir():
        found = [index / f"autotagging-{split}.tsv" for split in ("train", "validation", "test")]
        missing = [table for table in found if not table.is_file()]
        if missing:
            raise UserError(f"no file {missing[0]}: give a table, or a folder such as splits/split-0, as --index")
        return found
    if not index.is_file():
        raise UserError(f"no file {index}: copy the repository's data/ to {root / 'data'}, or give --index")
    return [index]


def _find_file(places: list[Path], name: str) -> Path:
    for place in places:
        if (place / name).is_file():
            return place / name
    raise UserError(f"no {name} in {places[0]}: copy it from the root of the MTG-Jamendo repository")


def _split_name(table: Path) -> str:
    found = _SPLIT.search(table.name)
    return {"train": "train", "validation": "valid", "test": "test"}[found[1]] if found else ""


def _map_file(path: Path) -> mmap.mmap | bytes:
    if path.stat().st_size == 0:
        return b""
    with open_table(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
