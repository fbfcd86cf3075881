"""The score: notes on an integer grid, tracks, and the finished piece with its clock."""

import math
from dataclasses import dataclass
from typing import Any

TICKS = 12  # ticks per beat: divides into eighths (6), sixteenths (3) and triplets (4)


@dataclass(frozen=True, slots=True)
class Note:
    """One note: `start` and `duration` in ticks (12 a beat), `pitch` a MIDI key, `velocity` 1 to 127.

    `late` and `held` are the performer's: seconds that it starts and ends later than written.
    """

    start: int
    duration: int
    pitch: int
    velocity: int
    late: float = 0.0
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class Track:
    """One part: `role` is lead, counter, chords, second, pad, bass or drums; `level` in dB against the lead."""

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


@dataclass(frozen=True, slots=True)
class Ritardando:
    """A tempo that falls steadily from tick `first` to `slowest` (a fraction of the tempo) at tick `last`."""

    first: int
    last: int
    slowest: float = 0.65

    def delay(self, tick: int) -> float:
        """By how many ticks of the full tempo a tick sounds later."""
        span, loss = self.last - self.first, 1 - self.slowest
        u = min(max(tick - self.first, 0), span) / span
        return span * (-math.log(1 - loss * u) / loss - u)


@dataclass(frozen=True, slots=True)
class Room:
    """The reverb of a piece: a room's name and the level of the reverberation in dB."""

    name: str
    wet: float


@dataclass(frozen=True)
class Piece:
    """A composed piece: `bpm` perceived beats per minute, `duration` in seconds, `truth` the annotations.

    `swell` is the loudness of each bar in dB.
    """

    id: str
    title: str
    bpm: int
    metre: Metre
    tracks: tuple[Track, ...]
    duration: float
    truth: dict[str, Any]
    room: Room
    ritardando: Ritardando | None = None
    swell: tuple[float, ...] = (0.0,)

    def seconds(self, tick: int) -> float:
        """The time of a tick, in seconds."""
        delay = self.ritardando.delay(tick) if self.ritardando else 0.0
        return (tick + delay) / TICKS * 60.0 / self.bpm

    def onset(self, note: Note) -> float:
        """When a note sounds, in seconds."""
        return max(0.0, self.seconds(note.start) + note.late)

    def release(self, note: Note) -> float:
        """When a note ends, in seconds."""
        return self.seconds(note.start + note.duration) + note.held
