"""What is kept for evaluation, read from what a user has of it: works, artists and sound to keep out of a corpus."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources import jamendo, musicbench, musiccaps, song_describer
from data_prep.sources.listing import audio_files
from data_prep.sources.records import CsvTable, good, open_table, text
from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

_KNOWN = ("song_describer.csv", "musiccaps-public.csv")


@dataclass(frozen=True)
class References:
    """An evaluation set.

    Attributes:
        name: for reports.
        works: identities of its recordings, as in `data_prep.track.Track.work`.
        artists: identities of its artists, as in `Track.artist`.
        audio: its audio files, where they are at hand.
    """

    name: str
    works: set[str]
    artists: set[str]
    audio: list[Path]


def read_references(path: Path) -> References:
    """Read song_describer.csv, a CSV of MusicCaps, a table of MusicBench or MTG-Jamendo, a store or a folder of audio.

    Audio is what lies of its works in a folder `audio` beside a table; a set laid out otherwise can be named once more,
    as a folder of audio. Of a store it is the test split. A folder that holds one of the tables is read as that table.

    Raises:
        UserError: none of them, or one that cannot be read.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise UserError(f"there is no {path}: --against names an evaluation set's table, folder of audio or store")
    with open_table(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"TRACK_ID\t"):
        return _of_jamendo(path)
    if head.lstrip().startswith(b"{") or b"main_caption" in head:
        return _of_musicbench(path)
    table = CsvTable(path, ())
    if all(name in table for name in song_describer.NEEDED):
        return _of_song_describer(table)
    if "ytid" in table:
        works = _values(table, lambda row: f"youtube:{musiccaps.video(row['ytid'])}")
        return References(path.stem, works, set(), _beside(path, works, _videos_of))
    raise UserError(f"{path} is no table of Song Describer, MusicCaps, MusicBench or MTG-Jamendo: it has other columns")


def _of_folder(path: Path) -> References:
    if (path / "store.json").is_file():
        return _of_store(path)
    for name in _KNOWN:
        if (path / name).is_file():
            return read_references(path / name)
    audio = [path / inside for inside in audio_files(path)]
    if not audio:
        raise UserError(f"there is no audio file and no known table in {path}: --against names an evaluation set")
    return References(path.name, set(), set(), audio)


def _of_store(path: Path) -> References:
    from ssmttm.data.store import open_store

    store = open_store(path)
    rows = store.indices("test")
    table = store.manifest.take(rows)
    works, artists = (
        {value for value in table[name].to_pylist() if value} if name in table.column_names else set()
        for name in ("work", "artist")
    )
    kept = [row for row, name in zip(rows, table["audio"].to_pylist(), strict=True) if name is not None]
    return References(path.name, works, artists, [store.audio_path(int(row)) for row in kept])


def _of_jamendo(path: Path) -> References:
    works, artists, named = set(), set(), []
    for row in jamendo.read_table(path):
        if isinstance(row, Rejection):
            raise UserError(f"{path} {row.reason}: restore it from the repository")
        works.add(f"jamendo:{row.track}")
        artists.add(f"jamendo:artist:{row.artist}")
        named.append(row.path)
    places = [path.parent / "audio", path.parent]
    ways = [(place, end) for place in places for end in (".mp3", ".low.mp3")]
    found = (next((place / f"{name}{end}" for place, end in ways if (place / f"{name}{end}").is_file()), None)
             for name in named)  # fmt: skip
    return References(path.stem, works, artists, [file for file in found if file])


def _of_musicbench(path: Path) -> References:
    table = musicbench.read_table(path)
    works = _values(table, lambda row: musicbench.work_of(text(row.get("location"))))
    return References(path.stem, works, set(), _beside(path, works, _videos_of))


def _of_song_describer(table: CsvTable) -> References:
    works = _values(table, lambda row: f"jamendo:{_number(row['track_id'])}")
    artists = _values(table, lambda row: f"jamendo:artist:{_number(row['artist_id'])}")
    return References(table.path.stem, works, artists, _beside(table.path, works, _track_of))


def _values(table: Any, identity: Callable[[dict[str, Any]], str]) -> set[str]:
    """The identities of all rows. A row that cannot be read would let its recording in, so it is a UserError."""
    found = set()
    for record in table:
        try:
            found.add(identity(good(record.values)))
        except Rejected as rejected:
            raise UserError(f"{table.path} line {record.line}: {rejected.reason}; take the original file") from rejected
    if not found:
        raise UserError(f"{table.path} names no recording: take the original file")
    return found


def _number(cell: str) -> int:
    digits = cell.removesuffix(".0")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
        raise Rejected("metadata", f"{cell[:40]!r} is no number of Jamendo")
    return int(digits)


def _beside(table: Path, works: set[str], works_of: Callable[[str], set[str]]) -> list[Path]:
    """Files of the works in a folder `audio` beside a table; what else lies there may be the very corpus."""
    folder = table.parent / "audio"
    files = audio_files(folder) if folder.is_dir() else ()
    return [folder / inside for inside in files if works & works_of(Path(inside).stem)]


def _videos_of(stem: str) -> set[str]:
    """The video that a clip's name begins with, be it after a bracket or a Y."""
    return {f"youtube:{stem[:11]}", f"youtube:{stem[1:12]}"}


def _track_of(stem: str) -> set[str]:
    number = stem.partition(".")[0]
    return {f"jamendo:{int(number)}"} if number.isdecimal() and number.isascii() else set()
