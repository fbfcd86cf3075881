"""Bass lines: roots and inversions close to one another, and notes that lead into the next chord."""

from random import Random

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.instruments import Instrument
from data_prep.builtin.composition.parts.patterns import lay
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.styles.definition import Manner
from data_prep.builtin.composition.theory import Chord, Key


def _near(pitch_class: int, pitch: int, who: Instrument) -> int:
    """The octave of a pitch class nearest to a pitch, in the range, preferring low ones."""
    options = [p for p in range(who.low, who.high + 1) if p % 12 == pitch_class]
    return min(options, key=lambda p: (abs(p - pitch) + 0.25 * (p - who.low), p))


def bass_tones(dice: Random, chords: list[Chord], keys: list[str], key: Key, who: Instrument, inversions: float,
               fixed: set[int]) -> list[int]:
    """The bass note under each chord: its root or, where that makes the line move by step, its third.

    The chords numbered in `fixed` keep their root. Chords of equal `keys` have the same bass note.
    """
    line: list[int] = []
    memory: dict[tuple[str, Chord], int] = {}
    for i, (place, chord) in enumerate(zip(keys, chords, strict=True)):
        root, third, *_ = chord.pitch_classes(key)
        at = line[-1] if line else who.low + 6
        pitch = _near(root, at, who)
        if line and i not in fixed and chord == chords[i - 1]:
            pitch = at
        elif line and i not in fixed and dice.random() < inversions:
            inverted = _near(third, at, who)
            pitch = inverted if 0 < abs(inverted - at) <= 2 else pitch
        line.append(memory.setdefault((place, chord), pitch))
    return line


def _approach(dice: Random, key: Key, target: int, at: int, chromatic: bool) -> int:
    """A note that leads into `target` from the side of `at`: a scale step, or a semitone."""
    side = 1 if at > target else -1
    if chromatic and dice.random() < 0.35:
        return target + side
    scale = {key.pitch(degree) % 12 for degree in range(7)}
    return next(pitch for pitch in (target + side, target + 2 * side, target + 3 * side) if pitch % 12 in scale)


def play_bass(salt: str, bars: list[Bar], chords: list[Chord], tones: list[int], key: Key, pattern: str, metre: Metre,
              slot: int, who: Instrument, manner: Manner, calm: bool = False) -> list[Note]:
    """A bass pattern: every chord enters on its bass note; before some chords the last half beat leads there.

    `calm` does so more rarely, so that a slow pulse is not perceived as twice as fast.
    Bars that repeat one another draw the same.
    """
    notes: list[Note] = []
    chance = manner.approach * (0.3 if calm else 1.0)
    for number, bar in enumerate(bars):
        dice = Random(f"{salt} bass {bar.key}")
        for start, length, char in lay(pattern, metre, slot, number) if "bass" in bar.parts else ():
            at = start // slot
            following = min(at + 1, len(tones) - 1)
            _, third, fifth, *_ = chords[at].pitch_classes(key)
            base, target, enters = tones[at], tones[following], start % slot == 0
            pitch = {"1": base, "3": _near(third, base, who), "5": _near(fifth, base, who),
                     "8": base + 12 if base + 12 <= who.high + 4 else base,
                     "n": _approach(dice, key, target, base, manner.chromatic)}[char]
            notes.append(Note(start, length, base if enters else pitch, 96 if enters else 84))
            ends = start + length == (at + 1) * slot
            if ends and target != base and char != "n" and length >= 6 and dice.random() < chance:
                notes[-1:] = _lead_in(notes[-1], _approach(dice, key, target, base, manner.chromatic), metre)
    return notes


def _lead_in(note: Note, pitch: int, metre: Metre) -> list[Note]:
    """A note whose end (half a beat; a third in compound metres) goes to another pitch."""
    part = TICKS // 3 if metre.compound else TICKS // 2
    if note.duration <= part:
        return [Note(note.start, note.duration, pitch, note.velocity)] if note.start % (metre.bar // 2) else [note]
    kept = note.duration - part
    return [Note(note.start, kept, note.pitch, note.velocity), Note(note.start + kept, part, pitch, 84)]
