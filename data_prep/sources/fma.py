"""FMA (Defferrard et al. 2017, github.com/mdeff/fma): the Free Music Archive with genres, tags and official splits.

tracks.csv has two header rows and a third with the name of the index. It states licences by title only; raw_tracks.csv
also has their links and takes precedence.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.sources.listing import check_root, first_present
from data_prep.sources.records import CsvTable, Positions, csv_records, listed, rejection_of, require
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

LAYOUT = """\
ROOT/fma_metadata/tracks.csv             the tracks (or as --index)
ROOT/fma_metadata/raw_tracks.csv         licences with their links (optional: else the titles in tracks.csv)
ROOT/fma_metadata/genres.csv             the genres' names
ROOT/fma_full/000/000002.mp3 ...         the audio: fma_full, fma_large, fma_medium, fma_small or ROOT itself"""

SPLITS = {"training": "train", "validation": "valid", "test": "test", "": ""}
WITHOUT_AUDIO = {99134, 108925, 133297}  # the data set's errata
_SUBSETS = ("small", "medium", "large", "full")
_NEEDED = (("track", "title"), ("track", "license"), ("artist", "id"), ("artist", "name"), ("set", "subset"))


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Tracks of FMA, up to the largest unpacked subset. `index`: another tracks.csv, beside the other tables."""
    check_root(root)
    table = require(index or root / "fma_metadata" / "tracks.csv", "the tracks of FMA, from fma_metadata.zip")
    places, largest = _audio_folders(root)
    licences = _RawTracks(table.parent / "raw_tracks.csv")
    genres = _genres(table.parent / "genres.csv")
    for record in _records(table):
        if isinstance(record.values, Rejected):
            yield rejection_of(table, record)
            continue
        try:
            values = record.values
            number = int(values["id"]) if values["id"].isdecimal() and len(values["id"]) <= 12 else -1
            if number < 0:
                raise Rejected("metadata", f"line {record.line} has no track number")
            if _rank(values["set", "subset"]) <= largest:
                yield _track(root, places, number, values, record.line, licences, genres)
        except Rejected as error:
            yield error.for_item(f"fma:{record.values['id'] or f'line {record.line}'}")


def _track(
    root: Path, places: list[str], number: int, values: Any, line: int, licences: "_RawTracks", genres: dict[str, str]
) -> Track:
    if number in WITHOUT_AUDIO:
        raise Rejected("missing", "the data set's errata list it as without audio")
    file = f"{number:06d}"
    path = first_present(root, [f"{place}{file[:3]}/{file}.mp3" for place in places])
    if path is None:
        raise Rejected("missing", f"there is no file {file[:3]}/{file}.mp3")
    title, link, page, evidence = licences.find(number)
    title = title or values["track", "license"]
    if "fma-limited" in title.lower():
        raise Rejected("licence", f"{title}: it allows listening only")
    if values["set", "split"] not in SPLITS:
        raise Rejected("metadata", f"line {line} has an unknown split {values['set', 'split'][:40]!r}")
    return Track(
        id=f"fma:{number}", path=path, licence=link or title, title=values["track", "title"],
        author=values["artist", "name"], source_url=page,
        artist=f"fma:artist:{values['artist', 'id']}" if values["artist", "id"] else "", work=f"fma:{number}",
        evidence=(evidence or f"tracks.csv line {line}") if link or title else "", tags=_tags(values, genres),
        split=SPLITS[values["set", "split"]],
    )  # fmt: skip


class _RawTracks:
    """raw_tracks.csv: title and link of a track's licence, and its page."""

    def __init__(self, path: Path) -> None:
        self._table = CsvTable(path, ("track_id", "licence_title", "licence_url")) if path.is_file() else None
        self._positions = Positions()
        for record in self._table or ():
            if not isinstance(record.values, Rejected) and record.values["track_id"].isdecimal():
                self._positions.add(int(record.values["track_id"][:12]), record.offset, record.line)

    def find(self, number: int) -> tuple[str, str, str, str]:
        """Title and link of a track's licence, its page, and the line that states them; empty if unknown."""
        found = self._positions.find(number)
        if not (self._table and found):
            return "", "", "", ""
        offset, line = found[0]
        values = self._table.at(offset)
        link = values["licence_url"]
        known = "creativecommons.org" in link or "artlibre.org" in link
        page = values.get("track_url", "")
        return values["licence_title"], link if known else "", page, f"raw_tracks.csv line {line}"


def _records(table: Path) -> Iterator[Any]:
    """Records of tracks.csv: values by (first, second) header, and the index by "id"."""
    records = csv_records(table)
    headers = [record.values for record in islice(records, 2)]
    if len(headers) < 2 or any(isinstance(cells, Rejected) for cells in headers):
        raise UserError(f"{table} is not the tracks.csv of FMA: it has no two rows of headers")
    columns: dict[Any, int] = {pair: index for index, pair in enumerate(zip(*headers, strict=False)) if index}
    if missing := [pair for pair in _NEEDED if pair not in columns]:
        raise UserError(f"{table} is not the tracks.csv of FMA: no column {'/'.join(missing[0])}")
    columns["id"] = 0
    for record in records:
        cells = record.values
        if isinstance(cells, Rejected):
            yield record
        elif cells[0].strip() != "track_id":
            values = {name: cells[place].strip() if place < len(cells) else "" for name, place in columns.items()}
            yield record._replace(values={("set", "split"): ""} | values)


def _tags(values: Any, genres: dict[str, str]) -> tuple[str, ...]:
    top = values.get(("track", "genre_top"), "")
    names = [top, *(genres.get(str(number), "") for number in listed(values.get(("track", "genres_all"), "")))]
    free = [tag for tag in listed(values.get(("track", "tags"), "")) if isinstance(tag, str)]
    tags = [f"genre---{name.strip().lower()}" for name in names if name.strip()]
    return tuple(dict.fromkeys(tags + [f"tag---{tag.strip().lower()}" for tag in free if tag.strip()]))


def _genres(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    records = CsvTable(path, ("genre_id", "title"))
    return {record.values["genre_id"]: record.values["title"] for record in records
            if not isinstance(record.values, Rejected)}  # fmt: skip


def _audio_folders(root: Path) -> tuple[list[str], int]:
    """The folders of audio, the largest subset first, and its rank."""
    found = [(_rank(name), f"fma_{name}/") for name in reversed(_SUBSETS) if (root / f"fma_{name}").is_dir()]
    if not found and any(path.is_dir() and path.name.isdecimal() for path in root.glob("[0-9][0-9][0-9]")):
        found = [(_rank("full"), "")]
    if not found:
        raise UserError(f"no audio in {root}: unpack fma_large.zip, or another subset, there")
    return [place for _, place in found], found[0][0]


def _rank(subset: str) -> int:
    return _SUBSETS.index(subset) if subset in _SUBSETS else len(_SUBSETS) - 1
