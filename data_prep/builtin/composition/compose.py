"""Composition: draw a plan, lay out form and arrangement, write and perform the parts, state the truth."""

import math
from dataclasses import dataclass, replace
from random import Random

from data_prep.builtin.composition import annotations
from data_prep.builtin.composition.arrangement import Bar, arrange, slot_keys, swell
from data_prep.builtin.composition.harmony import Section, harmonise, plan_form
from data_prep.builtin.composition.instruments import Instrument
from data_prep.builtin.composition.parts import bass, counter, lead
from data_prep.builtin.composition.parts.chords import closing_chord, hold_chords, play_chords, strum, voice_chords
from data_prep.builtin.composition.parts.drums import KEYS, crash_key, play_drums
from data_prep.builtin.composition.parts.patterns import pulsing
from data_prep.builtin.composition.performance import perform
from data_prep.builtin.composition.plan import Plan, draw_plan
from data_prep.builtin.composition.score import TICKS, Note, Piece, Ritardando, Room, Track
from data_prep.builtin.composition.theory import Chord

VERSION = 3  # part of the seed: a change of the music is a new corpus
DURATION = 40.0  # seconds a piece: two segments
_LAST_ONSET = 38.6  # seconds: nothing starts later, so that the end can ring
_LEVELS = {"lead": 0.0, "counter": -7.0, "chords": -9.5, "second": -12.0, "pad": -15.0, "bass": -8.0, "drums": -9.0}
_STRUMMED = ("guitar", "harp")


@dataclass(frozen=True, slots=True)
class Layout:
    """The grid in ticks: `last` is the onset of the final chord, `end` where it stops sounding."""

    n_bars: int
    last: int
    end: int
    ritardando: Ritardando | None
    slot: int  # ticks of a chord

    def chords_a_bar(self, bar: int) -> int:
        """How many chords a bar of so many ticks holds."""
        return bar // self.slot


def _lay_out(rng: Random, plan: Plan) -> Layout:
    """Fill the duration: whole bars, and a final chord in the last one."""
    bar, beat = plan.metre.bar, 60.0 / plan.bpm
    slows = rng.random() < plan.manner.ritardando and plan.tempo_class != "fast"
    span = bar if plan.bar_seconds < 2.8 else -(-plan.metre.beats // 2) * TICKS
    delay = Ritardando(0, span).delay(span) / TICKS * beat if slows else 0.0
    latest = _LAST_ONSET - delay
    n_bars = int(latest / plan.bar_seconds) + 1
    last = (n_bars - 1) * bar
    if (n_bars - 1) * plan.bar_seconds < latest - 2.6:  # a long last bar: the end falls on its second half
        last += plan.metre.beats // 2 * TICKS
    end = math.floor((DURATION - 0.05 - delay) / beat * TICKS)
    slot = bar // 2 if plan.metre.beats == 4 and plan.bpm < 96 else bar  # slow bars hold two chords
    return Layout(n_bars, last, end, Ritardando(last - span, last) if slows else None, slot)


@dataclass(slots=True)
class _Writer:
    """Writes the accompaniment of one piece over its chords and bars."""

    rng: Random
    salt: str
    plan: Plan
    layout: Layout
    bars: list[Bar]
    chords: list[Chord]

    @property
    def keys(self) -> list[str]:
        """For each chord what is equal where bars repeat one another."""
        return slot_keys(self.bars, self.layout.chords_a_bar(self.plan.metre.bar))

    def chordal(self, who: Instrument, role: str, velocity: int) -> list[Note]:
        """A part in chords, in a pattern or held, with the final chord."""
        plan, layout = self.plan, self.layout
        patterns = plan.style.grooves[plan.metre.name].chords
        voicing = "close" if role == "second" else plan.manner.voicing
        voiced = voice_chords(self.chords, self.keys, plan.key, who.low + (0 if role == "chords" else 5), voicing)
        held = role == "pad" or (role == "second" and who.family in ("strings", "pad", "brass", "reeds"))
        if held:
            notes = hold_chords(role, self.bars, voiced, plan.metre, layout.slot)
        else:
            usual, variation = (pulsing(self.rng, patterns, plan.metre) if plan.tempo_class != "medium"
                           else self.rng.choice(patterns) for _ in range(2))
            variation = variation if self.rng.random() < 0.35 else usual
            notes = play_chords(role, self.bars, voiced, (usual, variation), plan.metre, layout.slot, velocity)
        notes = [note for note in notes if note.start < layout.last] + closing_chord(voiced[-1], layout.last)
        return strum(notes, 0.012) if who.family in _STRUMMED else notes

    def bass(self) -> list[Note]:
        """The bass line, which ends on the tonic."""
        plan, layout = self.plan, self.layout
        patterns = plan.style.grooves[plan.metre.name].bass
        walk = pulsing(self.rng, patterns, plan.metre) if plan.tempo_class == "slow" else self.rng.choice(patterns)
        a_bar = layout.chords_a_bar(plan.metre.bar)
        fixed = {i for n, bar in enumerate(self.bars) if bar.opens or bar.place == bar.section.n_bars - 1
                 for i in range(n * a_bar, (n + 1) * a_bar)}
        dice = Random(f"{self.salt} inversions")
        tones = bass.bass_tones(dice, self.chords, self.keys, plan.key, plan.bass, plan.manner.inversions, fixed)
        notes = bass.play_bass(self.salt, self.bars, self.chords, tones, plan.key, walk, plan.metre, layout.slot,
                               plan.bass, plan.manner, plan.tempo_class == "slow")
        tonic = plan.bass.low + (plan.key.tonic - plan.bass.low) % 12
        return [note for note in notes if note.start < layout.last] + [Note(layout.last, TICKS, tonic, 96)]

    def drums(self, kit: int) -> list[Note]:
        """The drums, with a kick and a cymbal at the end."""
        pattern = self.rng.choice(self.plan.style.grooves[self.plan.metre.name].drums)
        calm, last = self.plan.tempo_class == "slow", self.layout.last
        notes = play_drums(self.salt, self.bars, pattern, self.plan.metre, calm, kit)
        closing = [Note(last, TICKS, crash_key(kit), 80), Note(last, TICKS, KEYS["k"], 96)]
        return [note for note in notes if note.start < last] + closing


def _write_lead(rng: Random, plan: Plan, layout: Layout, sections: list[Section], bars: list[Bar],
                chords: list[Chord]) -> list[Note]:
    """The lead from the first phrase to the final note."""
    bar = plan.metre.bar
    part = lead.write_lead(rng, plan, sections, chords, layout.chords_a_bar(bar))
    final = lead.lead_voice(plan).chord_tone(part[-1].degree, Chord(0))
    notes = lead.play_lead(plan, lead.add_pickups(rng, plan, bars, part))
    return lead.end_lead(plan, notes, final, sections[-1].first_bar * bar, layout.last)


def _silence_stops(notes: list[Note], bars: list[Bar], bar: int) -> list[Note]:
    """The accompaniment without what falls into a stop, the second half of some bars."""
    kept = []
    for note in notes:
        at, half = note.start // bar, note.start // bar * bar + bar // 2
        if bars[at].stop and note.start >= half:
            continue
        cut = bars[at].stop and note.start + note.duration > half
        kept.append(replace(note, duration=half - note.start) if cut else note)
    return kept


def _finish(notes: list[Note], layout: Layout, length: int) -> tuple[Note, ...]:
    """Drop what starts after the final chord, which lasts `length` ticks."""
    kept = [replace(n, duration=length if n.start == layout.last else min(n.duration, layout.end - n.start))
            for n in notes if n.start <= layout.last]
    return tuple(sorted(kept, key=lambda n: (n.start, n.pitch)))


def _instruments(plan: Plan) -> dict[str, Instrument]:
    """Who plays, by role, in the order of the tracks."""
    instruments = {"lead": plan.lead, "chords": plan.chords, "bass": plan.bass, "pad": plan.pad, "second": plan.second,
               "counter": plan.counter, "drums": plan.kit}
    return {role: who for role, who in instruments.items() if who}


def _write_parts(rng: Random, salt: str, plan: Plan, layout: Layout) -> tuple[dict[str, list[Note]], list[Bar]]:
    """The notes of every part by role, as written, and the bars of the arrangement."""
    sections = plan_form(rng, layout.n_bars, plan.bar_seconds)
    bars = arrange(rng, sections, plan.roles, plan.manner.build)
    a_bar = layout.chords_a_bar(plan.metre.bar)
    sevenths = rng.random() < plan.style.sevenths
    chords = harmonise(rng, sections, plan.key.mode, sevenths, a_bar, plan.manner.vamp)
    melody = _write_lead(rng, plan, layout, sections, bars, chords)
    writer = _Writer(rng, salt, plan, layout, bars, chords)
    parts: dict[str, list[Note]] = {"lead": melody}
    for role, who in _instruments(plan).items():
        if role in ("chords", "second", "pad"):
            parts[role] = writer.chordal(who, role, 72)
        elif role == "bass":
            parts[role] = writer.bass()
        elif role == "drums":
            parts[role] = writer.drums(who.program)
        elif role == "counter":
            parts[role] = counter.write_counter(rng, salt, bars, melody, chords, plan.key, plan.metre, layout.slot, who)
    return {role: notes if role in ("lead", "drums") else _silence_stops(notes, bars, plan.metre.bar)
            for role, notes in parts.items()}, bars


def compose(seed: int, index: int) -> Piece:
    """Compose piece `index` of corpus `seed`: a pure function of the two (and of this package's version)."""
    salt = f"ssmttm builtin {VERSION} {seed} {index}"
    rng = Random(salt)
    plan = draw_plan(rng)
    layout = _lay_out(rng, plan)
    parts, bars = _write_parts(rng, salt, plan, layout)
    rings = layout.end - layout.last
    late = layout.last * 5.0 / plan.bpm > 37.8
    length = TICKS if plan.manner.stab and plan.tempo_class != "slow" and late and rng.random() < 0.5 else rings
    tracks = tuple(
        Track(who.name, role, who.program, who.family, _LEVELS[role],
              _finish(perform(salt, role, parts[role], bars, plan.metre, plan.bpm, plan.manner), layout, length))
        for role, who in _instruments(plan).items() if parts[role])
    identity = f"builtin-{seed}-{index:06d}"
    room = Room(plan.manner.room, plan.manner.wet + rng.uniform(-2, 1))
    title = annotations.title(plan)
    piece = Piece(identity, f"{title}, no. {index}", plan.bpm, plan.metre, tracks, DURATION, truth={}, room=room,
                  ritardando=layout.ritardando, swell=tuple(swell(bars)))
    truth = annotations.describe_piece(identity, plan, tracks) | annotations.timing(piece, plan, bars, layout.last)
    return replace(piece, truth=truth)
