"""Melody: motifs of rhythm and contour, set over the harmony, then repeated, sequenced, inverted and ornamented."""

from dataclasses import dataclass
from random import Random

from data_prep.builtin.composition.score import TICKS, Metre
from data_prep.builtin.composition.theory import CHARACTERISTIC, Chord, Key

# Rhythm cells in ticks, with weights, by density. Simple metres: one or two beats; compound metres: one beat.
_SIMPLE: dict[str, dict[tuple[int, ...], int]] = {
    "sparse": {(24,): 4, (12, 12): 5, (18, 6): 2, (12,): 2},
    "moderate": {(12, 12): 3, (12,): 3, (6, 6): 4, (18, 6): 3, (12, 6, 6): 3, (6, 6, 12): 2, (24,): 1},
    "dense": {(6, 6): 6, (12,): 2, (6, 3, 3): 3, (3, 3, 6): 3, (3, 3, 3, 3): 2, (6, 6, 6, 6): 3, (9, 3): 2},
}
_COMPOUND: dict[str, dict[tuple[int, ...], int]] = {
    "sparse": {(12,): 5, (8, 4): 2, (24,): 2},
    "moderate": {(12,): 2, (8, 4): 5, (4, 4, 4): 4},
    "dense": {(4, 4, 4): 7, (8, 4): 2, (2, 2, 4, 4): 2, (4, 2, 2, 4): 2},
}
_STEPS = {0: 2, 1: 7, -1: 7, 2: 4, -2: 4, 3: 1, -3: 1, 4: 1}


@dataclass(frozen=True, slots=True)
class Tone:
    """A melody note before it is played: onset and length in ticks from the phrase's start, and a scale degree."""

    start: int
    duration: int
    degree: int


@dataclass(frozen=True, slots=True)
class Motif:
    """A one-bar motif: note lengths in ticks and the scale steps between its notes."""

    rhythm: tuple[int, ...]
    steps: tuple[int, ...]

    def inverted(self) -> "Motif":
        """The same rhythm with the contour upside down."""
        return Motif(self.rhythm, tuple(-step for step in self.steps))


def draw_motif(rng: Random, metre: Metre, density: str, bpm: int) -> Motif:
    """A new one-bar motif; quick tempi leave the shortest values out."""
    cells = dict((_COMPOUND if metre.compound else _SIMPLE)[density])
    shortest = (4 if bpm > 84 else 2) if metre.compound else (6 if bpm > 112 else 3)
    cells = {cell: weight for cell, weight in cells.items() if min(cell) >= shortest}
    rhythm: list[int] = []
    while sum(rhythm) < metre.bar:
        fitting = {cell: weight for cell, weight in cells.items() if sum(rhythm) + sum(cell) <= metre.bar}
        rhythm.extend(rng.choices(list(fitting), list(fitting.values()))[0] if fitting else (TICKS,))
    steps, height = [], 0
    for _ in rhythm:
        weights = {step: weight for step, weight in _STEPS.items() if abs(height + step) <= 4}
        step = rng.choices(list(weights), list(weights.values()))[0]
        steps.append(step)
        height += step
    return Motif(tuple(rhythm), tuple(steps))


@dataclass(frozen=True, slots=True)
class Voice:
    """The key and range (in scale degrees) of the melody."""

    key: Key
    low: int
    high: int

    def fold(self, degree: int) -> int:
        """The degree reflected into the range."""
        while not self.low <= degree <= self.high:
            degree = 2 * (self.high if degree > self.high else self.low) - degree
        return degree

    def chord_tone(self, degree: int, chord: Chord) -> int:
        """The chord tone nearest to a degree. A raised third is excluded, so that the melody stays in the mode."""
        allowed = chord.degrees[:3] if not chord.leading else (chord.degrees[0], chord.degrees[2])
        ranked = sorted(range(degree - 4, degree + 5), key=lambda d: (abs(d - degree), d))
        near = [d for d in ranked if d % 7 in allowed and self.low <= d <= self.high]
        return near[0]

    def characteristic_tone(self, degree: int, chord: Chord) -> int:
        """The nearby tone that identifies the mode: the tonic chord's third, or the characteristic degree."""
        wanted = 2 if chord.root == 0 else CHARACTERISTIC[self.key.mode]
        near = [d for d in range(max(self.low, degree - 2), min(self.high, degree + 2) + 1) if d % 7 == wanted]
        return near[0] if near and wanted in chord.degrees and not chord.leading else degree


def _set_bar(rng: Random, voice: Voice, motif: Motif, chords: list[Chord], start: int, at: int, bar: int) -> list[Tone]:
    """One bar: the motif's contour from the chord tone near `at`, long and on-beat notes drawn to chord tones.

    Some strong notes move to the tone that identifies the mode.
    """
    tones: list[Tone] = []
    degree, tick = at, 0
    for i, length in enumerate(motif.rhythm):
        chord = chords[tick * len(chords) // bar]
        if i:
            degree = voice.fold(degree + motif.steps[i])
        strong = tick == 0 or (tick % TICKS == 0 and length >= TICKS)
        if strong or (chord.leading and degree % 7 == 6):
            degree = voice.chord_tone(degree, chord)
            if rng.random() < 0.3:
                degree = voice.characteristic_tone(degree, chord)
        tones.append(Tone(start + tick, min(length, bar - tick), degree))
        tick += length
    return tones


def _cadence_bar(rng: Random, voice: Voice, chord: Chord, start: int, at: int, metre: Metre, goal: int) -> list[Tone]:
    """A phrase's last bar: a short approach by step and a long arrival on `goal` (a degree, any octave)."""
    target = min((d for d in range(voice.low, voice.high + 1) if d % 7 == goal), key=lambda d: (abs(d - at), d))
    lengths, degrees = [metre.bar], [target]
    if rng.random() >= (0.4 if metre.compound else 0.5):
        lengths, degrees = [TICKS, metre.bar - TICKS], [voice.chord_tone(target + 2, chord), target]
    tones, tick = [], start
    for length, degree in zip(lengths, degrees, strict=True):
        tones.append(Tone(tick, length, degree))
        tick += length
    return tones


def write_phrase(rng: Random, voice: Voice, chords: list[Chord], metre: Metre, motifs: tuple[Motif, Motif],
                 closed: bool, slots: int = 1) -> list[Tone]:
    """A phrase over `slots` chords a bar: statement, repetition or sequence, contrast, and a cadence.

    Where the chords return as well, a repeated bar is mostly the same, note by note.
    `closed` phrases end on the tonic, the others on a tone of their last chord.
    """
    first, second = motifs
    plan = rng.choice(("aaba", "aabc", "abab", "abac", "aaac", "abic", "aaaa"))
    written: dict[tuple[str, tuple[Chord, ...]], list[Tone]] = {}
    tones: list[Tone] = []
    at = (voice.low + voice.high) // 2 + rng.randint(-2, 2)
    if chords[0].root == 0:  # opening on the third or the fifth identifies the mode at once
        at = voice.chord_tone(at, Chord(0))
        at = voice.fold(at + {0: 2, 2: 0, 4: 0}[at % 7] if rng.random() < 0.6 else at)
    n_bars = len(chords) // slots
    for bar in range(n_bars):
        start, chord = bar * metre.bar, chords[bar * slots]
        if bar == n_bars - 1:
            goal = 0 if closed and chord.root == 0 else rng.choice((chord.degrees[0], chord.degrees[2]))
            tones += _cadence_bar(rng, voice, chord, start, at, metre, goal)
            break
        letter, span = plan[bar % 4], tuple(chords[bar * slots : (bar + 1) * slots])
        if (letter, span) in written and rng.random() < 0.85:
            again = written[letter, span]
        else:
            motif = {"a": first, "b": second, "i": first.inverted(), "c": second}[letter]
            again = _set_bar(rng, voice, motif, list(span), 0, at, metre.bar)
            written[letter, span] = again
        tones += [Tone(t.start + start, t.duration, t.degree) for t in again]
        middle = (voice.low + voice.high) // 2
        at = tones[-1].degree + rng.choice((-1, 1, 1, 2) if tones[-1].degree < middle else (1, -1, -1, -2))
    return tones


def vary(rng: Random, tones: list[Tone], voice: Voice, shortest: int) -> list[Tone]:
    """A variation: some long notes gain a neighbour or a passing tone, some pairs of short notes merge."""
    varied: list[Tone] = []
    for i, tone in enumerate(tones):
        following = tones[i + 1].degree if i + 1 < len(tones) else tone.degree
        half = tone.duration // 2
        splits = shortest <= half <= TICKS and half % shortest == 0
        follows = bool(varied) and varied[-1].start + varied[-1].duration == tone.start
        if splits and rng.random() < 0.35:
            gap = following - tone.degree
            between = tone.degree + (1 if gap > 0 else -1) if abs(gap) >= 2 else tone.degree + rng.choice((1, -1))
            between = min(max(between, voice.low), voice.high)
            varied += [Tone(tone.start, half, tone.degree), Tone(tone.start + half, half, between)]
        elif follows and tone.duration < TICKS and tone.start % TICKS and rng.random() < 0.2:
            last = varied.pop()
            varied.append(Tone(last.start, last.duration + tone.duration, last.degree))
        else:
            varied.append(tone)
    return varied
