"""JamendoMaxCaps (Roy et al. 2025, arXiv 2502.07461): instrumental tracks of Jamendo with generated captions.

The metadata are responses of Jamendo's API, a file per day of release; a track may occur twice. Licences are taken from
each track's `license_ccurl`, not from the data set's page. There is a caption per 30 s; a track gets all of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.listing import check_root, first_present
from data_prep.sources.records import JsonLines, Positions, good, text, texts
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

LAYOUT = """\
ROOT/2008-02-15.jsonl ...                the metadata (or in a folder given as --index)
ROOT/final_caption30sec.jsonl            the captions (optional)
ROOT/audio/1100.mp3 ...                  the audio by track id, as files; also under mp3_files, data or ROOT itself"""

CAPTIONS = "final_caption30sec.jsonl"
_PLACES = ("audio/", "mp3_files/", "data/", "")
_ENDS = (".mp3", ".flac", ".wav", ".ogg", ".opus")
_TAGS = {"genres": "genre", "instruments": "instrument", "vartags": "mood/theme"}


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Tracks of JamendoMaxCaps. `index`: the folder of the .jsonl files, or one of them. Raises UserError if none."""
    check_root(root)
    place = index or root
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    files = [file for file in files if file.name != CAPTIONS and file.is_file()]
    if not files:
        raise UserError(f"no file such as 2008-02-15.jsonl, with the metadata of JamendoMaxCaps, in {place}")
    captions = _Captions(files[0].parent / CAPTIONS)
    yield from captions.read()
    known: set[int] = set()
    for file in files:
        for record in JsonLines(file):
            place_in_file = f"{file.name} line {record.line}"
            try:
                values = good(record.values)
                number = _number(values.get("id"))
                if number not in known:
                    known.add(number)
                    yield _track(root, number, values, captions, place_in_file)
            except Rejected as error:
                yield error.for_item(place_in_file)


class _Captions:
    """The file of captions, with an index of those of each track."""

    def __init__(self, path: Path) -> None:
        self._table, self._positions = JsonLines(path), Positions()

    def read(self) -> Iterator[Rejection]:
        """Index the captions; yield those that cannot be used."""
        path = self._table.path
        for record in self._table if path.is_file() else ():
            try:
                values = good(record.values)
                text(values.get("caption"))
                self._positions.add(_number(values.get("id")), record.offset, record.line)
            except Rejected as error:
                yield error.for_item(f"{path.name} line {record.line}")

    def find(self, number: int) -> tuple[str, ...]:
        return tuple(texts([self._table.at(offset).get("caption") for offset, _ in self._positions.find(number)]))


def _track(root: Path, number: int, values: dict[str, Any], captions: _Captions, evidence: str) -> Track:
    path = first_present(root, [f"{place}{number}{end}" for place in _PLACES for end in _ENDS])
    if path is None:
        raise Rejected("missing", f"has track {number}, of which there is no audio")
    licence, artist = text(values.get("licence_ccurl")), text(values.get("artist_id"))
    return Track(
        id=f"jamendomaxcaps:{number}", path=path, licence=licence, title=text(values.get("name")),
        author=text(values.get("artist_name")),
        source_url=text(values.get("shareurl")) or f"https://www.jamendo.com/track/{number}",
        artist=f"jamendo:artist:{artist}" if artist else "", work=f"jamendo:{number}",
        evidence=evidence if licence else "", captions=captions.find(number), tags=_tags(values.get("musicinfo")),
    )  # fmt: skip


def _tags(info: Any) -> tuple[str, ...]:
    info = info if isinstance(info, dict) else {}
    tags = info.get("tags") if isinstance(info.get("tags"), dict) else {}
    found = [f"{kind}---{name}" for key, kind in _TAGS.items() for name in texts(tags.get(key))]
    return tuple(found + [f"speed---{speed}" for speed in texts(info.get("speed"))])


def _number(value: Any) -> int:
    written = text(value)
    if not (written.isascii() and written.isdecimal() and len(written) <= 12):
        raise Rejected("metadata", "has no track number")
    return int(written)
