"""The score: notes on an integer grid, tracks, and the finished piece."""

from dataclasses import dataclass
from typing import Any

TICKS = 12  # ticks per beat: divides into eighths (6), sixteenths (3) and triplets (4)


@dataclass(frozen=True, slots=True)
class Note:
    """One note: `start` and `duration` in ticks (12 a beat), `pitch` a MIDI key, `velocity` 1 to 127."""

    start: int
    duration: int
    pitch: int
    velocity: int


@dataclass(frozen=True, slots=True)
class Track:
    """One part: `role` is lead, chords, pad, bass or drums; `level` its loudness in dB against the lead."""

    name: str
    role: str
    program: int
    family: str
    level: float
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Metre:
    """A time signature. The beat is the perceived one: a quarter in 3/4 and 4/4, a dotted quarter in 6/8."""

    name: str
    beats: int
    step: int  # ticks of the finest pattern step: a sixteenth

    @property
    def bar(self) -> int:
        """Ticks in a bar."""
        return self.beats * TICKS

    @property
    def steps(self) -> int:
        """Pattern steps in a bar."""
        return self.bar // self.step

    @property
    def compound(self) -> bool:
        """Whether the beat divides in three."""
        return self.step == 2


METRES = {"4/4": Metre("4/4", 4, 3), "3/4": Metre("3/4", 3, 3), "6/8": Metre("6/8", 2, 2)}


@dataclass(frozen=True)
class Piece:
    """A composed piece: `bpm` perceived beats per minute, `duration` in seconds, `truth` the annotations."""

    id: str
    title: str
    bpm: int
    metre: Metre
    tracks: tuple[Track, ...]
    duration: float
    truth: dict[str, Any]

    def seconds(self, tick: int) -> float:
        """The time of a tick, in seconds."""
        return tick / TICKS * 60.0 / self.bpm
