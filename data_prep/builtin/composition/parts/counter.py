"""The counter-melody: long guide tones, parallel thirds, or answers while the lead holds a note."""

from random import Random

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.instruments import Instrument
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.theory import Chord, Key

KINDS = ("guide tones", "thirds", "answers")


def _into(pitch: int, who: Instrument) -> int:
    """A pitch moved by octaves into the range."""
    while pitch > who.high:
        pitch -= 12
    while pitch < who.low:
        pitch += 12
    return pitch


def _guide(chord: Chord, key: Key, at: int, who: Instrument) -> int:
    """The chord's third or fifth nearest to `at`."""
    classes = chord.pitch_classes(key)[1:3]
    return min((p for p in range(who.low, who.high + 1) if p % 12 in classes), key=lambda p: (abs(p - at), p))


def guide_tones(bars: list[Bar], chords: list[Chord], key: Key, metre: Metre, slot: int, who: Instrument) -> list[Note]:
    """One long note a chord, moving as little as possible."""
    notes: list[Note] = []
    at = (who.low + who.high) // 2
    for i, chord in enumerate(chords):
        if "counter" in bars[min(i * slot // metre.bar, len(bars) - 1)].parts:
            at = _guide(chord, key, at, who)
            notes.append(Note(i * slot, slot - 1, at, 80))
    return notes


def thirds(bars: list[Bar], lead: list[Note], key: Key, metre: Metre, who: Instrument) -> list[Note]:
    """The lead's notes a third lower, moved by octaves into the range."""
    return [Note(n.start, n.duration, _into(key.pitch(key.degree_near(n.pitch) - 2), who), 78)
            for n in lead if "counter" in bars[n.start // metre.bar].parts]


def answers(salt: str, bars: list[Bar], lead: list[Note], chords: list[Chord], key: Key, metre: Metre, slot: int,
            who: Instrument) -> list[Note]:
    """Where the lead holds a note for a beat and a half or more, a run by step to a chord tone."""
    notes: list[Note] = []
    step = TICKS // 3 if metre.compound else TICKS // 2
    for note in lead:
        bar = bars[note.start // metre.bar]
        free = (note.duration + 1 - TICKS // 2) // step
        if "counter" not in bar.parts or free < 2:
            continue
        dice = Random(f"{salt} answer {bar.key} {note.start % metre.bar}")
        first = note.start + TICKS // 2 // step * step
        count = min(free, dice.randint(2, 4))
        chord = chords[min((first + (count - 1) * step) // slot, len(chords) - 1)]
        goal = key.degree_near(_guide(chord, key, (who.low + who.high) // 2 + dice.randint(-3, 3), who))
        side = dice.choice((1, -1))
        notes += [Note(first + i * step, step, _into(key.pitch(goal + side * (count - 1 - i)), who), 80)
                  for i in range(count)]
    return notes


def write_counter(rng: Random, salt: str, bars: list[Bar], lead: list[Note], chords: list[Chord], key: Key,
                  metre: Metre, slot: int, who: Instrument) -> list[Note]:
    """A counter-melody of a kind drawn at random."""
    kind = rng.choice(KINDS)
    if kind == "guide tones":
        return guide_tones(bars, chords, key, metre, slot, who)
    if kind == "thirds":
        return thirds(bars, lead, key, metre, who)
    return answers(salt, bars, lead, chords, key, metre, slot, who)
