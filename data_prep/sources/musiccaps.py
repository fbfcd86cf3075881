"""MusicCaps (Agostinelli et al. 2023): captions and aspects by musicians for 10 s of 5,521 videos of YouTube.

The licence CC BY-SA 4.0 is that of the captions.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.listing import audio_files, check_root
from data_prep.sources.records import CsvTable, listed, rejection_of, require, texts
from data_prep.track import Rejected, Rejection, Track

LAYOUT = """\
ROOT/musiccaps-public.csv                captions (or as --index)
ROOT/**/[-0SdAVK79lg]-[30-40].wav        the clips, in any folder; also -0SdAVK79lg.wav, -0SdAVK79lg_30.wav,
                                         -0SdAVK79lg_30_40.wav, -0SdAVK79lg_30000_40000.wav (milliseconds), with - for _
The audio has no stated licence: give --licence if you may use it."""

NEEDED = ("ytid", "start_s", "end_s", "caption", "aspect_list")


def tracks(root: Path, index: Path | None = None) -> Iterator[Track | Rejection]:
    """Clips of MusicCaps; those of AudioSet's evaluation set are the test split. `index`: another CSV."""
    check_root(root)
    table = CsvTable(require(index or root / "musiccaps-public.csv", "the captions of MusicCaps"), NEEDED)
    clips = {os.path.splitext(os.path.basename(path))[0]: path for path in audio_files(root)}
    for record in table:
        if isinstance(record.values, Rejected):
            yield rejection_of(table.path, record)
            continue
        name = f"musiccaps:{record.values['ytid']}"
        try:
            yield _track(name, record.values, clips)
        except Rejected as error:
            yield Rejection(name, error.kind, f"line {record.line} {error.reason}")


def video(text: str) -> str:
    """A video id of YouTube. Raises Rejected for anything else."""
    if len(text) != 11 or not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise Rejected("metadata", "has no video id of 11 characters")
    return text


def _track(name: str, values: dict[str, str], clips: dict[str, str]) -> Track:
    work = video(values["ytid"])
    path = next((clips[stem] for stem in _stems(work, values["start_s"], values["end_s"]) if stem in clips), None)
    if path is None:
        raise Rejected("missing", f"there is no clip of {work}")
    return Track(
        id=name, path=path, title=f"{work} {values['start_s']}-{values['end_s']} s",
        source_url=f"https://www.youtube.com/watch?v={work}&t={values['start_s']}s", work=f"youtube:{work}",
        captions=tuple(texts(values["caption"])),
        tags=tuple(f"aspect---{aspect}" for aspect in texts(listed(values["aspect_list"]))),
        split=_split(values.get("is_audioset_eval", "").lower()),
    )  # fmt: skip


def _split(is_eval: str) -> str:
    splits = {"true": "test", "1": "test", "1.0": "test", "yes": "test", "false": "train", "0": "train",
              "0.0": "train", "no": "train", "": ""}  # fmt: skip
    if is_eval not in splits:
        raise Rejected("metadata", f"its is_audioset_eval {is_eval[:40]!r} is neither true nor false")
    return splits[is_eval]


def _stems(work: str, start: str, end: str) -> list[str]:
    """Usual file names of a clip, without extension, the most exact first."""
    try:
        first, last = int(float(start)), int(float(end))
    except (ValueError, OverflowError) as error:
        raise Rejected("metadata", "has no start and end in seconds") from error
    spans = [(first, last), (first * 1000, last * 1000)]
    stems = [f"[{work}]-[{first}-{last}]"]
    for lead in (work, f"Y{work}"):
        stems += [f"{lead}{mark}{a}{second}{b}" for a, b in spans for mark in "_-" for second in "_-"]
        stems += [f"{lead}{mark}{a}" for a, _ in spans for mark in "_-"]
        stems.append(lead)
    return stems
