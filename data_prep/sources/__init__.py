"""Data sets as they are downloaded: a module each, which reads its tables to tracks and rejections."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources import fma, folder, jamendo, jamendomaxcaps, musicbench, musiccaps, song_describer
from data_prep.track import Rejection, Track


@dataclass(frozen=True)
class Source:
    """A data set."""

    name: str  # command of `python -m data_prep`
    help: str  # one line
    layout: str  # the files expected under the root
    tracks: Callable[[Path, Path | None], Iterator[Track | Rejection]]  # of a folder and another table, in fixed order


_ALL = (
    Source("folder", "your own audio files, with captions in a table or beside them", folder.LAYOUT, folder.tracks),
    Source("jamendo", "MTG-Jamendo: 55,000 tracks with tags", jamendo.LAYOUT, jamendo.tracks),
    Source("fma", "FMA: 106,574 tracks of the Free Music Archive", fma.LAYOUT, fma.tracks),
    Source("jamendomaxcaps", "JamendoMaxCaps: 200,000 instrumental tracks with captions", jamendomaxcaps.LAYOUT,
           jamendomaxcaps.tracks),
    Source("musiccaps", "MusicCaps: captions of 5,521 clips, for evaluation", musiccaps.LAYOUT, musiccaps.tracks),
    Source("musicbench", "MusicBench: MusicCaps altered and extended", musicbench.LAYOUT, musicbench.tracks),
    Source("song-describer", "Song Describer: captions of 706 tracks of MTG-Jamendo, for evaluation",
           song_describer.LAYOUT, song_describer.tracks),
)  # fmt: skip
SOURCES = {source.name: source for source in _ALL}
