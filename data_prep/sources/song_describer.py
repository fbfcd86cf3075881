"""Song Describer (Manco et al. 2023): captions by listeners for 706 tracks of MTG-Jamendo's split-0 test.

For evaluation only. As in published results only captions of the validated subset (`is_valid_subset` true) are used; a
track without one is rejected. audio_licenses.txt states the licences of the audio; the captions are CC BY-SA 4.0.
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
    """Tracks of Song Describer, all in the test split. `index`: another CSV with the same columns."""
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
            item = f"{table.path.name} line {record.line}"
            yield Rejection(item, "metadata", f"line {record.line} has no track number")
            continue
        rows.setdefault(number, values)
        if values.get("is_valid_subset", "true").lower() in ("true", "1", "1.0") and values["caption"]:
            captions.setdefault(number, []).append(values["caption"])
    for number, values in rows.items():
        name = f"song-describer:{int(number)}"
        try:
            yield _track(root, name, int(number), values, captions.get(number, []), licences)
        except Rejected as error:
            yield error.for_item(name)


def _track(
    root: Path, name: str, number: int, values: dict[str, str], captions: list[str], licences: Licences
) -> Track:
    if not captions:
        raise Rejected("caption", "none of its captions is in the valid subset")
    named = within(values["path"]).removesuffix(".mp3").removesuffix(".2min")
    path = first_present(root, [f"{place}{named}{end}" for place in _PLACES for end in (".2min.mp3", ".mp3")])
    if path is None:
        raise Rejected("missing", f"there is no file {named}.2min.mp3")
    stated = licences.find(number)
    title, author, url = stated.credit()
    artist = values["artist_id"].removesuffix(".0")
    return Track(
        id=name, path=path, licence=stated.licence, title=title, author=author,
        source_url=url or f"https://www.jamendo.com/track/{number}",
        artist=f"jamendo:artist:{int(artist)}" if artist.isdecimal() and len(artist) <= 12 else "",
        work=f"jamendo:{number}", evidence=stated.evidence, captions=tuple(dict.fromkeys(captions)), split="test",
    )  # fmt: skip
