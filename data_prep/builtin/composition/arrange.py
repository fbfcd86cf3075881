"""The accompaniment: chords, bass, drums and pad, each from a one-bar pattern applied to the harmony."""

import math
from collections.abc import Iterator
from random import Random

from data_prep.builtin.composition.groove import events
from data_prep.builtin.composition.instruments import Instrument
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.theory import Chord, Key, voice

DRUM_KEYS = {"k": 36, "s": 38, "r": 37, "p": 44, "h": 42, "o": 46, "i": 51, "c": 49, "q": 39, "t": 45, "m": 70, "w": 76,
             "b": 56, "g": 63}
_DRUM_VELOCITY = {"x": 100, "o": 62}


def pulsing(rng: Random, patterns: tuple[str, ...], metre: Metre) -> str:
    """Draw a pattern, preferring about one event a beat, so that the beat (not its half or double) is perceived."""
    rates = [len(events(pattern)) / metre.beats for pattern in patterns]
    return rng.choices(patterns, [1 / (0.2 + abs(math.log2(rate))) for rate in rates])[0]


def voicings(chords: list[Chord], key: Key, low: int) -> list[tuple[int, ...]]:
    """A voicing of each chord with smooth voice leading, in the octaves above `low` (a MIDI key)."""
    voiced: list[tuple[int, ...]] = []
    for chord in chords:
        voiced.append(voice(chord, key, voiced[-1] if voiced else (), low))
    return voiced


def _repeat_pattern(pattern: str, metre: Metre, slot: int, n_slots: int) -> Iterator[tuple[int, int, str]]:
    """A one-bar pattern repeated, as (tick, length, character); a note across a chord change is repeated there."""
    for bar_start in range(0, n_slots * slot, metre.bar):
        for step, steps, char in events(pattern):
            start, end = bar_start + step * metre.step, bar_start + (step + steps) * metre.step
            while start < end:
                stop = min(end, (start // slot + 1) * slot)
                yield start, stop - start, char
                start = stop


def play_chords(voiced: list[tuple[int, ...]], pattern: str, metre: Metre, slot: int, accent: int) -> list[Note]:
    """A chord pattern over voicings that last `slot` ticks each."""
    notes: list[Note] = []
    for start, length, char in _repeat_pattern(pattern, metre, slot, len(voiced)):
        pitches = voiced[start // slot]
        ladder = (*pitches, pitches[0] + 12, pitches[1] + 12)
        chosen = {"C": pitches, "L": pitches[:1], "U": pitches[1:]}.get(char) or (ladder[int(char)],)
        velocity = accent + (12 if start % TICKS == 0 else -8) - (6 if len(chosen) > 1 else 0)
        notes += [Note(start, length, pitch, velocity) for pitch in chosen]
    return notes


def hold_chords(voiced: list[tuple[int, ...]], slot: int) -> list[Note]:
    """A sustained pad: every chord held for its `slot` ticks."""
    return [Note(i * slot, slot, pitch, 70) for i, pitches in enumerate(voiced) for pitch in pitches[:3]]


def play_bass(chords: list[Chord], key: Key, pattern: str, metre: Metre, slot: int, who: Instrument) -> list[Note]:
    """A bass pattern: every chord enters on its root, low in the range; `n` steps towards the next root."""
    notes: list[Note] = []
    for start, length, char in _repeat_pattern(pattern, metre, slot, len(chords)):
        chord, following = chords[start // slot], chords[min(start // slot + 1, len(chords) - 1)]
        root, third, fifth, *_ = (who.low + (pitch_class - who.low) % 12 for pitch_class in chord.pitch_classes(key))
        neighbour = (following.root + (1 if following.root <= chord.root else -1)) % 7
        octave = root + 12 if root + 12 <= who.high + 4 else root
        approach = who.low + (key.pitch(neighbour) - who.low) % 12
        enters = start % slot == 0
        pitch = root if enters else {"1": root, "3": third, "5": fifth, "8": octave, "n": approach}[char]
        notes.append(Note(start, length, pitch, 96 if enters else 84))
    return notes


def play_drums(
    rng: Random, pattern: str, metre: Metre, n_bars: int, section_starts: set[int], calm: bool
) -> list[Note]:
    """A drum pattern, with a fill before and a cymbal on the first beat of a section.

    `calm` leaves the cymbals and shakers between the beats out, so that a slow pulse is not perceived as twice as fast.
    """
    voices = [line.split() for line in pattern.split("|")]
    notes: list[Note] = []
    for bar in range(n_bars):
        fill = bar > 0 and bar + 1 in section_starts and rng.random() < 0.6
        start = bar * metre.bar
        for letter, cells in voices:
            for step, cell in enumerate(cells):
                tick = step * metre.step
                replaced = fill and letter in "st" and tick >= metre.bar - TICKS
                if cell in _DRUM_VELOCITY and not replaced and not (calm and letter in "him" and tick % TICKS):
                    notes.append(Note(start + tick, metre.step, DRUM_KEYS[letter], _DRUM_VELOCITY[cell]))
        if fill:
            last_beat = start + metre.bar - TICKS
            keys = (38, 38, 45, 43) if any(letter == "s" for letter, _ in voices) else (45, 45, 43, 41)
            ticks = (0, 4, 8) if metre.compound else (0, 6, 9)
            notes += [Note(last_beat + t, 3, key, 84) for t, key in zip(ticks, keys, strict=False)]
        if bar in section_starts and any(letter in "ks" for letter, _ in voices):
            notes.append(Note(start, TICKS, DRUM_KEYS["c"], 76))
    return notes


def swing(notes: list[Note]) -> list[Note]:
    """Long-short eighths: the second half of each beat moves to its last third; ends of notes move alike."""
    warp = {3: 4, 6: 8, 9: 10}
    swung = []
    for note in notes:
        end = note.start + note.duration
        start = note.start - note.start % TICKS + warp.get(note.start % TICKS, note.start % TICKS)
        end = end - end % TICKS + warp.get(end % TICKS, end % TICKS)
        swung.append(Note(start, end - start, note.pitch, note.velocity))
    return swung
