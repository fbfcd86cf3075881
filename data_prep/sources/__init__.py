"""Data sets as they are downloaded, each read by a module of its own: its tables -> tracks, or why one is refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.sources import fma, folder, jamendo, jamendomaxcaps, musicbench, musiccaps, song_describer
from data_prep.track import Rejection, Track


class Reader(Protocol):
    """`root` is the data set's folder, `index` another table where a set has several."""

    def __call__(self, root: Path, index: Path | None = None) -> Iterator[Track | Rejection]: ...


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: as the command line takes it.
        help: one line.
        layout: which files are expected where under the root.
        tracks: gives its tracks one after the other, in an order of their own that is always the same.
    """

    name: str
    help: str
    layout: str
    tracks: Reader


SOURCES = {
    source.name: source
    for source in (
        Source("folder", "your own audio files, with captions in a table or beside them", folder.LAYOUT, folder.tracks),
        Source("jamendo", "MTG-Jamendo: 55,000 tracks with tags", jamendo.LAYOUT, jamendo.tracks),
        Source("fma", "FMA: 106,574 tracks of the Free Music Archive", fma.LAYOUT, fma.tracks),
        Source(
            "jamendomaxcaps",
            "JamendoMaxCaps: 200,000 instrumental tracks with captions",
            jamendomaxcaps.LAYOUT,
            jamendomaxcaps.tracks,
        ),
        Source("musiccaps", "MusicCaps: captions of 5,521 clips, for evaluation", musiccaps.LAYOUT, musiccaps.tracks),
        Source("musicbench", "MusicBench: MusicCaps altered and extended", musicbench.LAYOUT, musicbench.tracks),
        Source(
            "song-describer",
            "Song Describer: captions of 706 tracks of MTG-Jamendo, for evaluation",
            song_describer.LAYOUT,
            song_describer.tracks,
        ),
    )
}
