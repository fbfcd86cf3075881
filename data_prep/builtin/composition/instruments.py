"""Instruments: General MIDI programs by family, with plain names, comfortable ranges and articulation."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Instrument:
    """`low` to `high` is the melodic range in MIDI keys; `legato` the sounding fraction of a note's length;
    `rolls`: long notes are played as rolls, as on a marimba."""

    name: str
    program: int
    family: str
    low: int
    high: int
    legato: float = 0.95
    rolls: bool = False


def _family(family: str, *rows: tuple[Any, ...]) -> tuple[Instrument, ...]:
    return tuple(Instrument(row[0], row[1], family, *row[2:]) for row in rows)


LEADS: dict[str, tuple[Instrument, ...]] = {
    "piano": _family(
        "piano", ("piano", 0, 62, 86), ("bright piano", 1, 62, 86), ("honky-tonk piano", 3, 62, 84),
        ("electric piano", 4, 60, 84), ("harpsichord", 6, 60, 84)),
    "mallets": _family(
        "mallets", ("celesta", 8, 67, 91, 1.0), ("glockenspiel", 9, 72, 93, 1.0), ("music box", 10, 67, 91, 1.0),
        ("vibraphone", 11, 62, 84, 1.0), ("marimba", 12, 60, 84, 1.0, True), ("xylophone", 13, 67, 91, 1.0, True)),
    "organ": _family(
        "organ", ("Hammond organ", 16, 60, 83), ("church organ", 19, 60, 81), ("reed organ", 20, 60, 81),
        ("accordion", 21, 60, 83)),
    "guitar": _family(
        "guitar", ("nylon-string guitar", 24, 57, 79), ("steel-string guitar", 25, 57, 79), ("jazz guitar", 26, 57, 79),
        ("clean electric guitar", 27, 57, 79), ("distorted electric guitar", 30, 55, 77), ("banjo", 105, 60, 80)),
    "strings": _family(
        "strings", ("violin", 40, 62, 86), ("viola", 41, 55, 77), ("cello", 42, 48, 69),
        ("string ensemble", 48, 60, 83),
        ("fiddle", 110, 62, 84)),
    "brass": _family(
        "brass", ("trumpet", 56, 60, 81), ("trombone", 57, 50, 70), ("muted trumpet", 59, 60, 81),
        ("French horn", 60, 53, 74), ("brass section", 61, 57, 77)),
    "reeds": _family(
        "reeds", ("soprano saxophone", 64, 62, 84), ("alto saxophone", 65, 57, 79), ("tenor saxophone", 66, 52, 74),
        ("oboe", 68, 62, 84), ("bassoon", 70, 46, 67), ("clarinet", 71, 57, 81)),
    "flutes": _family(
        "flutes", ("piccolo", 72, 74, 93), ("flute", 73, 67, 90), ("recorder", 74, 67, 88), ("pan flute", 75, 65, 86),
        ("ocarina", 79, 65, 86)),
    "synth": _family("synth", ("square-wave synth lead", 80, 60, 84), ("sawtooth synth lead", 81, 60, 84),
                     ("bass-and-lead synth", 87, 57, 79), ("polysynth", 90, 60, 84)),
}

_BACKING = (
    Instrument("piano", 0, "piano", 50, 72), Instrument("electric piano", 4, "piano", 50, 72),
    Instrument("harpsichord", 6, "piano", 50, 72), Instrument("vibraphone", 11, "mallets", 53, 74),
    Instrument("organ", 16, "organ", 50, 72), Instrument("church organ", 19, "organ", 48, 70),
    Instrument("accordion", 21, "organ", 52, 72), Instrument("nylon-string guitar", 24, "guitar", 48, 70),
    Instrument("jazz guitar", 26, "guitar", 48, 70), Instrument("steel-string guitar", 25, "guitar", 48, 70),
    Instrument("clean electric guitar", 27, "guitar", 50, 71),
    Instrument("overdriven guitar", 29, "guitar", 45, 66), Instrument("strings", 48, "strings", 50, 72),
    Instrument("harp", 46, "harp", 48, 74), Instrument("brass section", 61, "brass", 50, 70),
    Instrument("warm synth pad", 89, "pad", 50, 72), Instrument("synth chords", 90, "synth", 50, 72),
    Instrument("synth strings", 50, "strings", 50, 72), Instrument("halo pad", 94, "pad", 50, 72),
    Instrument("synth bells", 98, "synth", 60, 80), Instrument("French horns", 60, "brass", 48, 68),
    Instrument("clarinets", 71, "reeds", 53, 72),
    Instrument("acoustic bass", 32, "bass", 30, 48), Instrument("bass guitar", 33, "bass", 30, 48),
    Instrument("fretless bass", 35, "bass", 30, 48), Instrument("synth bass", 38, "bass", 30, 48),
    Instrument("tuba", 58, "bass", 32, 50), Instrument("cello", 42, "bass", 38, 55),
)
BACKING: dict[str, Instrument] = {instrument.name: instrument for instrument in _BACKING}

# Instruments of a second melody, by the kind of style.
COUNTERS: dict[str, tuple[Instrument, ...]] = {
    "acoustic": _family("flutes", ("flute", 73, 65, 84)) + _family("reeds", ("clarinet", 71, 55, 76))
    + _family("strings", ("cello", 42, 46, 67), ("violin", 40, 60, 81)) + _family("brass", ("French horn", 60, 50, 70)),
    "band": _family("brass", ("muted trumpet", 59, 58, 77), ("trombone", 57, 50, 69))
    + _family("mallets", ("vibraphone", 11, 58, 79)) + _family("reeds", ("alto saxophone", 65, 55, 75))
    + _family("guitar", ("jazz guitar", 26, 52, 72)),
    "electronic": _family("synth", ("square-wave synth lead", 80, 57, 77), ("polysynth", 90, 57, 77))
    + _family("mallets", ("glockenspiel", 9, 72, 91)) + _family("strings", ("synth strings", 50, 57, 76)),
}
