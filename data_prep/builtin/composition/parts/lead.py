"""The lead: phrases that return, vary and begin with pick-ups, played with the instrument's articulation."""

from random import Random

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.harmony import Section
from data_prep.builtin.composition.melody import Motif, Tone, Voice, draw_motif, vary, write_phrase
from data_prep.builtin.composition.plan import Plan
from data_prep.builtin.composition.score import TICKS, Note
from data_prep.builtin.composition.theory import Chord

_SILENT = ("intro", "break", "end")


def lead_voice(plan: Plan) -> Voice:
    """The lead's key and range: an octave and a half from the low end of the instrument."""
    low = plan.key.degree_near(plan.lead.low) + 1
    return Voice(plan.key, low, min(plan.key.degree_near(plan.lead.high), low + 11))


def _motif_pairs(rng: Random, plan: Plan) -> dict[str, tuple[Motif, Motif]]:
    """Two motifs for the phrases of each letter; the letters share some, so that the tune holds together."""
    motifs = [draw_motif(rng, plan.metre, plan.density, plan.bpm) for _ in range(4)]
    return {"A": (motifs[0], motifs[1]), "B": (motifs[2], motifs[1]), "C": (motifs[3], motifs[0].inverted())}


def write_lead(rng: Random, plan: Plan, sections: list[Section], chords: list[Chord], slots: int) -> list[Tone]:
    """The melody over the whole form: sections of one letter share their tune, primed ones vary its second half."""
    bar, voice, pairs = plan.metre.bar, lead_voice(plan), _motif_pairs(rng, plan)
    memory: dict[tuple[str, bool], list[Tone]] = {}
    part: list[Tone] = []
    for section in sections:
        if section.label in _SILENT:
            continue
        letter = section.label[:1]
        span = chords[section.first_bar * slots : (section.first_bar + section.n_bars) * slots]
        tones = memory.get((letter, section.closed))
        if tones is None:
            tones = write_phrase(rng, voice, span, plan.metre, pairs.get(letter, pairs["A"]), section.closed, slots)
            other = memory.get((letter, not section.closed))
            if other is not None:  # the same phrase with another cadence
                cut = (section.n_bars - 2) * bar
                tones = [t for t in other if t.start < cut] + [t for t in tones if t.start >= cut]
            memory[letter, section.closed] = tones
        if "'" in section.label:
            half = (section.n_bars // 2) * bar
            varied = vary(rng, [t for t in tones if t.start >= half], voice, 12 if plan.metre.compound else 6)
            tones = [t for t in tones if t.start < half] + varied
        part += [Tone(t.start + section.first_bar * bar, t.duration, t.degree) for t in tones]
    return part


def add_pickups(rng: Random, plan: Plan, bars: list[Bar], part: list[Tone]) -> list[Tone]:
    """Let some phrases begin with one to three notes before the bar line; there must be time for them."""
    voice, by_start = lead_voice(plan), {tone.start: tone for tone in part}
    length = TICKS // 3 if plan.metre.compound else TICKS // 2 if plan.bpm < 150 else TICKS
    count = rng.choice((1, 2, 2, 3) if length < TICKS else (1, 1, 2))
    rising = rng.choice((1, 1, -1))
    starts = [n * plan.metre.bar for n, bar in enumerate(bars) if n and bar.opens and n * plan.metre.bar in by_start]
    for start in starts if rng.random() < 0.7 else ():
        first = start - count * length
        before = max((t for t in part if t.start < start), key=lambda t: t.start, default=None)
        if before and before.start + before.duration > first:
            if first - before.start < TICKS:
                continue
            part[part.index(before)] = Tone(before.start, first - before.start, before.degree)
        goal = by_start[start].degree
        part += [Tone(first + i * length, length, voice.fold(goal - rising * (count - i))) for i in range(count)]
    return sorted(part, key=lambda tone: tone.start)


def play_lead(plan: Plan, part: list[Tone]) -> list[Note]:
    """The melody as notes: the instrument's articulation, a breath after long notes, rolls."""
    notes = []
    stroke = plan.metre.step if plan.bpm < 120 else 2 * plan.metre.step
    for tone in part:
        length = max(1, round(tone.duration * plan.lead.legato)) - (1 if tone.duration >= 2 * TICKS else 0)
        pitch = plan.key.pitch(tone.degree)
        if plan.lead.rolls and tone.duration * 5 / plan.bpm > 0.7:  # 5 / bpm: seconds a tick
            notes += [Note(tone.start + tick, stroke, pitch, 94 - (14 if tick else 0))
                      for tick in range(0, tone.duration, stroke)]
        else:
            notes.append(Note(tone.start, length, pitch, 94))
    return notes


def end_lead(plan: Plan, notes: list[Note], final: int, end_bar: int, last: int) -> list[Note]:
    """The melody's end on the scale degree `final` at tick `last`; notes lead there where the last bar leaves room."""
    notes = [note for note in notes if note.start < end_bar]
    if last > end_bar:
        notes.append(Note(end_bar, last - end_bar, plan.key.pitch(final + 2), 94))
    return [*notes, Note(last, TICKS, plan.key.pitch(final), 94)]
