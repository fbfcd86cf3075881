"""Evaluation sets to exclude from a corpus: works, artists and audio, read from tables, folders or stores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources import jamendo, musicbench, musiccaps, song_describer
from data_prep.sources.listing import audio_files
from data_prep.sources.records import CsvTable, good, open_table, text
from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

_KNOWN_TABLES = ("song_describer.csv", "musiccaps-public.csv")


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set."""

    name: str
    works: set[str] = field(default_factory=set)  # identities, as in `data_prep.track.Track`
    artists: set[str] = field(default_factory=set)
    audio: list[Path] = field(default_factory=list)  # available audio files
    fingerprints: Sequence[np.ndarray] = ()  # uint32 [T] of each file, empty if it cannot be decoded; added by `select`


def read_evaluation_set(path: Path) -> EvaluationSet:
    """Read a table of Song Describer, MusicCaps, MusicBench or MTG-Jamendo, a folder of audio, or a store.

    The audio of a table's works is searched in a folder `audio` beside it. Of a store the test split is read. A folder
    with one of the tables is read as that table.

    Raises:
        UserError: none of these, or it cannot be read.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"no {path}: give the table, folder of audio or store of an evaluation set")
    with open_table(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"TRACK_ID\t"):
        return _read_jamendo(path)
    if head.lstrip().startswith(b"{") or b"main_caption" in head:
        return _read_musicbench(path)
    table = CsvTable(path, ())
    if all(name in table for name in song_describer.NEEDED):
        return _read_song_describer(table)
    if "ytid" in table:
        works = _identities(table, lambda row: f"youtube:{musiccaps.video(row['ytid'])}")
        return EvaluationSet(path.stem, works, set(), _audio_beside(path, works, _videos_of))
    raise UserError(f"{path} has not the columns of Song Describer, MusicCaps, MusicBench or MTG-Jamendo")


def _read_folder(path: Path) -> EvaluationSet:
    if (path / "store.json").is_file():
        return _read_store(path)
    for name in _KNOWN_TABLES:
        if (path / name).is_file():
            return read_evaluation_set(path / name)
    audio = [path / inside for inside in audio_files(path)]
    if not audio:
        raise UserError(f"no audio file and no known table in {path}: give the folder of an evaluation set")
    return EvaluationSet(path.name, set(), set(), audio)


def _read_store(path: Path) -> EvaluationSet:
    from ssmttm.data.store import open_store

    store = open_store(path)
    rows = store.indices("test")
    table = store.manifest.take(rows)
    works, artists = (
        {value for value in table[name].to_pylist() if value} if name in table.column_names else set()
        for name in ("work", "artist")
    )
    kept = [row for row, name in zip(rows, table["audio"].to_pylist(), strict=True) if name is not None]
    return EvaluationSet(path.name, works, artists, [store.audio_path(int(row)) for row in kept])


def _read_jamendo(path: Path) -> EvaluationSet:
    works, artists, named = set(), set(), []
    for row in jamendo.read_table(path):
        if isinstance(row, Rejection):
            raise UserError(f"{path} {row.reason}: restore it from the repository")
        works.add(f"jamendo:{row.track}")
        artists.add(f"jamendo:artist:{row.artist}")
        named.append(row.path)
    places = [path.parent / "audio", path.parent]
    audio = []
    for name in named:
        candidates = [place / f"{name}{end}" for place in places for end in (".mp3", ".low.mp3")]
        audio += [file for file in candidates if file.is_file()][:1]
    return EvaluationSet(path.stem, works, artists, audio)


def _read_musicbench(path: Path) -> EvaluationSet:
    table = musicbench.read_table(path)
    works = _identities(table, lambda row: musicbench.work_of(text(row.get("location"))))
    return EvaluationSet(path.stem, works, set(), _audio_beside(path, works, _videos_of))


def _read_song_describer(table: CsvTable) -> EvaluationSet:
    works = _identities(table, lambda row: f"jamendo:{_number(row['track_id'])}")
    artists = _identities(table, lambda row: f"jamendo:artist:{_number(row['artist_id'])}")
    return EvaluationSet(table.path.stem, works, artists, _audio_beside(table.path, works, _track_of))


def _identities(table: Any, identity: Callable[[dict[str, Any]], str]) -> set[str]:
    """The identities of all rows. An unreadable row is a UserError: its recording could not be excluded."""
    found = set()
    for record in table:
        try:
            found.add(identity(good(record.values)))
        except Rejected as error:
            raise UserError(f"{table.path} line {record.line}: {error.reason}; take the original file") from error
    if not found:
        raise UserError(f"{table.path} has no recording: take the original file")
    return found


def _number(cell: str) -> int:
    digits = cell.removesuffix(".0")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
        raise Rejected("metadata", f"{cell[:40]!r} is not a number of Jamendo")
    return int(digits)


def _audio_beside(table: Path, works: set[str], works_of: Callable[[str], set[str]]) -> list[Path]:
    """The audio files of the works in a folder `audio` beside a table; other files may belong to the corpus."""
    folder = table.parent / "audio"
    files = audio_files(folder) if folder.is_dir() else ()
    return [folder / inside for inside in files if works & works_of(Path(inside).stem)]


def _videos_of(stem: str) -> set[str]:
    """The video at the start of a clip's name, also after a bracket or a Y."""
    return {f"youtube:{stem[:11]}", f"youtube:{stem[1:12]}"}


def _track_of(stem: str) -> set[str]:
    number = stem.partition(".")[0]
    return {f"jamendo:{int(number)}"} if number.isdecimal() and number.isascii() else set()
