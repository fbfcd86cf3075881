"""MusicBench (Melechovsky et al. 2024): MusicCaps with altered copies of its clips, paraphrased captions and features.

The work of every track is the video, as in MusicCaps. The licence CC BY-SA 3.0 is that of the captions.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.listing import check_root, first_present, within
from data_prep.sources.musiccaps import video
from data_prep.sources.records import CsvTable, JsonLines, listed, rejection_of, require, text, texts
from data_prep.track import Rejected, Rejection, Track
from ssmttm.errors import UserError

LAYOUT = """\
ROOT/MusicBench_train.json               an object per line (or as --index: MusicBench_test_A.json ..., also as .csv)
ROOT/datashare/data_aug2/...wav          the audio as in MusicBench.tar.gz; also under data or ROOT itself
The audio has no stated licence: give --licence if you may use it."""

_PLACES = ("", "datashare/", "data/", "datashare/data/", "MusicBench/", "MusicBench/datashare/")
_VIDEO = re.compile(r"[\w-]{11}(?=$|[_.\-])", re.ASCII)


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Clips of MusicBench. `index`: another of its tables, JSON lines or CSV, with the split in its name.

    The main captions contain the sentences about chords, beats, tempo and key (`prompt_...`). Raises UserError.
    """
    check_root(root)
    path = require(index or root / "MusicBench_train.json", "MusicBench's captions")
    records = read_table(path)
    split = "test" if "test" in path.stem.lower() else "train" if "train" in path.stem.lower() else ""
    for record in records:
        if isinstance(record.values, Rejected):
            yield rejection_of(path, record)
            continue
        try:
            yield _track(root, record.values, split)
        except Rejected as error:
            yield Rejection(f"{path.name} line {record.line}", error.kind, f"line {record.line} {error.reason}")


def read_table(path: Path) -> CsvTable | JsonLines:
    """A table of MusicBench. Raises UserError for a JSON file without an object per line."""
    if path.suffix.lower() == ".csv":
        return CsvTable(path, ("location", "main_caption"))
    with open(path, "rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            raise UserError(f"{path} has no JSON object per line: take the original files of MusicBench")
    return JsonLines(path)


def work_of(location: str) -> str:
    """The video that a file such as `data_aug2/-0SdAVK79lg_3.wav` was cut from. Raises Rejected if it names none."""
    found = _VIDEO.match(location.rpartition("/")[2])
    return f"youtube:{video(found[0] if found else '')}"


def _track(root: Path, values: dict[str, Any], split: str) -> Track:
    location = within(text(values.get("location")))
    name = location.rpartition("/")[2]
    path = first_present(root, [f"{place}{location}" for place in _PLACES] + [f"{place}{name}" for place in _PLACES])
    if path is None:
        raise Rejected("missing", f"names {location}, which does not exist")
    work = work_of(location)
    captions = [values.get("main_caption"), values.get("alt_caption")]
    return Track(
        id=f"musicbench:{location}", path=path, title=name.rpartition(".")[0],
        source_url=f"https://www.youtube.com/watch?v={work.removeprefix('youtube:')}", work=work,
        captions=tuple(texts(captions)), tags=_key(values.get("key")), split=split,
    )  # fmt: skip


def _key(value: Any) -> tuple[str, ...]:
    """The key as a tag, from a list such as `['G', 'minor']` or its text."""
    parts = texts(listed(text(value)) if not isinstance(value, list) else value)
    return (f"key---{' '.join(parts).lower()}",) if parts else ()
