"""The performance: swing, micro-timing, accents by metrical weight, and dynamics of phrases and sections."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.styles.definition import Manner

# Seconds by which a part lies behind (or before) the beat, for looseness 1; its habitual and its accidental spread.
_LEAN = {"bass": 0.003, "lead": 0.004, "counter": 0.006, "pad": -0.01, "second": 0.002}
_HABIT, _ACCIDENT, _MOST = 0.006, 0.0025, 0.022
_ACCENTS = {"bar": 8, "half": 4, "beat": 2, "between": -8}
_RANGE = {"lead": 30, "counter": 30, "chords": 30, "second": 30, "pad": 24, "bass": 20, "drums": 28}  # velocity
_USUAL = 0.75  # the energy of notes as written


def warp(tick: int, swing: float, shuffle: float) -> float:
    """The tick at which an event sounds: off-beat eighths late by `swing`, sixteenths by `shuffle`; 1 is triplets."""
    place = tick % TICKS
    eighth = {3: 1.0, 6: 2.0, 9: 1.0}.get(place, 0.0) * swing
    sixteenth = {3: 1.0, 9: 1.0}.get(place, 0.0) * shuffle
    return tick + max(eighth, sixteenth)


def metrical_accent(tick: int, metre: Metre) -> int:
    """The accent of a place in the bar, as velocity."""
    if tick % metre.bar == 0:
        return _ACCENTS["bar"]
    if metre.beats == 4 and tick % metre.bar == 2 * TICKS:
        return _ACCENTS["half"]
    return _ACCENTS["beat"] if tick % TICKS == 0 else _ACCENTS["between"]


def phrase_arc(bar: Bar) -> float:
    """-1 to 1: a phrase grows to its third quarter and falls to its end."""
    length = max(1, bar.section.n_bars - 1)
    return math.sin(math.pi * min(1.0, bar.place / length) ** 1.4) * 2 - 1 if bar.section.n_bars > 2 else 0.0


def _dynamics(note: Note, role: str, bar: Bar, metre: Metre) -> float:
    """The velocity of a note from accents, phrase and section."""
    arc = 5 * phrase_arc(bar) if role in ("lead", "counter") else 2 * phrase_arc(bar)
    accent = metrical_accent(note.start, metre) * (0.5 if role == "drums" else 0 if role == "pad" else 1)
    return note.velocity + accent + arc + _RANGE[role] * (bar.energy - _USUAL)


def perform(salt: str, role: str, notes: Sequence[Note], bars: list[Bar], metre: Metre, bpm: int,
            manner: Manner) -> list[Note]:
    """The notes with the timing and dynamics of a performance.

    Each part has habits (the same place in the bar is always a little early or late, strong or weak), so that bars
    that repeat still repeat, and small accidents. In songs and layered music, and in half of the other parts, bars that
    repeat one another are copies, as producers make them, with the same accidents.
    """
    rng, habits = Random(f"{salt} {role}"), Random(f"{salt} habits {role}")
    copied, current = manner.build != "tune" or habits.random() < 0.5, -1
    tick_seconds, loose = 5.0 / bpm, manner.looseness
    places = {place: (habits.gauss(0, _HABIT), habits.gauss(0, 3)) for place in range(metre.bar)}
    swing = 0.0 if metre.compound else manner.swing * min(1.0, 1.15 - bpm / 450)
    shuffle = 0.0 if metre.compound else manner.shuffle
    played = []
    chord: tuple[int, float, float] = (-1, 0.0, 0.0)
    for note in sorted(notes, key=lambda n: (n.start, n.pitch)):
        bar = bars[min(note.start // metre.bar, len(bars) - 1)]
        if copied and note.start // metre.bar != current:
            current = note.start // metre.bar
            rng = Random(f"{salt} {role} {bar.key}")
        if note.start != chord[0]:  # the notes of a chord share their timing
            habit, weight = places[note.start % metre.bar]
            late = loose * (_LEAN.get(role, 0.0) + habit + rng.gauss(0, _ACCIDENT))
            chord = (note.start, min(max(late, -_MOST), _MOST), loose * (weight + rng.gauss(0, 1)))
        end = note.start + note.duration
        late = chord[1] + (warp(note.start, swing, shuffle) - note.start) * tick_seconds + note.late
        velocity = _dynamics(note, role, bar, metre) + chord[2]
        played.append(replace(note, velocity=min(127, max(20, round(velocity))), late=late,
                              held=(warp(end, swing, shuffle) - end) * tick_seconds + note.held))
    return played
