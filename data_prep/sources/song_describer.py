"""Song Describer (Manco et al. 2023): captions by listeners for 706 tracks of MTG-Jamendo's split-0 test.

It is made for evaluation only. Each caption was checked by hand: `is_valid_subset` is true, false, or empty where the
checkers did not decide. Published figures are on the true ones, so only those are captions here, and a track without
one is refused. The audio's licences stand in audio_licenses.txt; CC BY-SA 4.0 is the captions'.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.jamendo import Licences
from data_prep.sources.listing import check_root, first_present, within
from data_prep.sources.records import CsvTable, rejection_of, require
from data_prep.track import Rejected, Rejection, Track

LAYOUT = """\
ROOT/song_describer.csv                  captions (or as --index)
ROOT/audio_licenses.txt                  the licences
ROOT/audio/00/1004100.2min.mp3 ...       the audio of audio.zip; also under ROOT itself, also .mp3"""

NEEDED = ("track_id", "caption", "artist_id", "path")
_PLACES = ("audio/", "audio/audio/", "data/audio/", "")


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Tracks of Song Describer, all of the test split. `index`: another CSV of the same columns.

    Raises:
        UserError: a table is missing or another one.
    """
    check_root(root)
    table = CsvTable(require(index or root / "song_describer.csv", "Song Describer's captions"), NEEDED)
    licences = Licences(require(table.path.parent / "audio_licenses.txt", "the licences of Song Describer's audio"))
    rows: dict[str, dict[str, str]] = {}
    captions: dict[str, list[str]] = {}
    for record in table:
        if isinstance(record.values, Rejected):
            yield rejection_of(table.path, record)
            continue
        values = record.values
        number = values["track_id"].removesuffix(".0")  # as pandas writes integers beside nulls
        if not (number.isdecimal() and number.isascii() and len(number) <= 12):
            yield Rejection(f"{table.path.name} line {record.line}", "metadata", f"line {record.line} names no track")
            continue
        rows.setdefault(number, values)
        if values.get("is_valid_subset", "true").lower() in ("true", "1", "1.0") and values["caption"]:
            captions.setdefault(number, []).append(values["caption"])
    for number, values in rows.items():
        name = f"song-describer:{int(number)}"
        try:
            yield _track(root, name, int(number), values, captions.get(number, []), licences)
        except Rejected as rejected:
            yield rejected.of(name)


def _track(
    root: Path, name: str, number: int, values: dict[str, str], captions: list[str], licences: Licences
) -> Track:
    if not captions:
        raise Rejected("caption", "none of its captions is in the valid subset")
    named = within(values["path"]).removesuffix(".mp3").removesuffix(".2min")
    path = first_present(root, [f"{place}{named}{end}" for place in _PLACES for end in (".2min.mp3", ".mp3")])
    if path is None:
        raise Rejected("missing", f"there is no file {named}.2min.mp3")
    stated = licences.of(number)
    title, author, url = stated.credit()
    artist = values["artist_id"].removesuffix(".0")
    return Track(
        id=name,
        path=path,
        licence=stated.licence,
        title=title,
        author=author,
        source_url=url or f"https://www.jamendo.com/track/{number}",
        artist=f"jamendo:artist:{int(artist)}" if artist.isdecimal() and len(artist) <= 12 else "",
        work=f"jamendo:{number}",
        evidence=stated.evidence,
        captions=tuple(dict.fromkeys(captions)),
        split="test",
    )
