"""Chords: voicings with inversions and smooth voice leading, played in patterns, and held pads."""

from collections.abc import Iterator

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.parts.patterns import lay
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.theory import Chord, Key

Voicing = tuple[int, ...]


def _stacks(classes: tuple[int, ...], low: int) -> Iterator[Voicing]:
    """Every inversion in close position, its lowest note in the octave above `low`, a MIDI key."""
    for first in range(len(classes)):
        pitches = [low + (classes[first] - low) % 12]
        for wanted in classes[first + 1 :] + classes[:first]:
            pitches.append(pitches[-1] + 1 + (wanted - pitches[-1] - 1) % 12)
        yield tuple(pitches)


def candidates(chord: Chord, key: Key, low: int, voicing: str) -> list[Voicing]:
    """Voicings to choose from: close, spread (the second note an octave up) or shell (no root under a seventh)."""
    classes = chord.pitch_classes(key)
    if voicing == "shell" and len(classes) == 4:
        classes = classes[1:]
    if voicing == "spread":
        return [tuple(sorted((stack[0], stack[1] + 12, *stack[2:]))) for stack in _stacks(classes, low - 5)]
    return list(_stacks(classes, low))


def motion(before: Voicing, after: Voicing) -> float:
    """How far the voices move, in semitones; the outer ones count more."""
    inner = sum(min(abs(p - q) for q in before) for p in after)
    return inner + 0.5 * abs(after[0] - before[0]) + 0.5 * abs(after[-1] - before[-1])


def voice_chords(chords: list[Chord], keys: list[str], key: Key, low: int, voicing: str) -> list[Voicing]:
    """A voicing of each chord, each near the one before it and near the middle of the range.

    Chords of equal `keys` (places that repeat one another) have the same voicing.
    """
    voiced: list[Voicing] = []
    memory: dict[tuple[str, Chord], Voicing] = {}
    home = low + 9
    for place, chord in zip(keys, chords, strict=True):
        def cost(pitches: Voicing) -> float:
            return (motion(voiced[-1], pitches) if voiced else 0.0) + 0.15 * abs(sum(pitches) / len(pitches) - home)

        if (place, chord) not in memory:
            memory[place, chord] = min(candidates(chord, key, low, voicing), key=cost)
        voiced.append(memory[place, chord])
    return voiced


def play_chords(role: str, bars: list[Bar], voiced: list[Voicing], patterns: tuple[str, str], metre: Metre, slot: int,
                velocity: int) -> list[Note]:
    """A chord pattern over voicings of `slot` ticks each; the second pattern in every fourth bar."""
    notes: list[Note] = []
    for number, bar in enumerate(bars):
        if role not in bar.parts:
            continue
        pattern = patterns[1] if bar.place % 4 == 3 and bar.section.label != "end" else patterns[0]
        for start, length, char in lay(pattern, metre, slot, number):
            pitches = voiced[start // slot]
            ladder = sorted((*pitches, pitches[0] + 12, pitches[1] + 12))
            chosen = {"C": pitches, "L": pitches[:1], "U": pitches[1:]}.get(char) or (ladder[int(char)],)
            softer = 6 if len(chosen) > 1 else 0
            notes += [Note(start, length, pitch, velocity - softer) for pitch in chosen]
    return notes


def hold_chords(role: str, bars: list[Bar], voiced: list[Voicing], metre: Metre, slot: int) -> list[Note]:
    """A sustained part: every chord held until the next; common notes are tied within a section."""
    notes: list[Note] = []
    open_notes: dict[int, int] = {}  # pitch -> index of its note
    for i, pitches in enumerate(voiced):
        bar = bars[min(i * slot // metre.bar, len(bars) - 1)]
        fresh: dict[int, int] = {}
        for pitch in pitches[-3:] if role in bar.parts else ():
            tied = open_notes.get(pitch)
            if tied is not None and (i * slot) % (2 * metre.bar):
                last = notes[tied]
                notes[tied] = Note(last.start, last.duration + slot, pitch, last.velocity)
                fresh[pitch] = tied
            else:
                fresh[pitch] = len(notes)
                notes.append(Note(i * slot, slot, pitch, 70))
        open_notes = fresh
    return notes


def strum(notes: list[Note], gap: float) -> list[Note]:
    """Notes of a chord one after the other from the lowest, `gap` seconds apart, as on a guitar or a harp."""
    order: dict[int, list[int]] = {}
    for note in notes:
        order.setdefault(note.start, []).append(note.pitch)
    return [Note(n.start, n.duration, n.pitch, n.velocity, n.late + gap * sorted(order[n.start]).index(n.pitch), n.held)
            for n in notes]


def closing_chord(pitches: Voicing, last: int) -> list[Note]:
    """The final chord."""
    return [Note(last, TICKS, pitch, 76) for pitch in pitches]
