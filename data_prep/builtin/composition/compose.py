"""Composition: draw a plan, lay out the form, write the parts, and return the piece with its ground truth."""

import math
from dataclasses import dataclass, replace
from random import Random

from data_prep.builtin.composition import arrange
from data_prep.builtin.composition.groove import Style
from data_prep.builtin.composition.harmony import Section, harmonise, plan_form
from data_prep.builtin.composition.instruments import BACKING, LEADS, Instrument
from data_prep.builtin.composition.melody import Tone, Voice, draw_motif, vary, write_phrase
from data_prep.builtin.composition.score import METRES, TICKS, Metre, Note, Piece, Track
from data_prep.builtin.composition.styles import STYLES
from data_prep.builtin.composition.theory import MODES, Chord, Key, is_bright, tonic_name

VERSION = 2  # part of the seed: a change of the music is a new corpus
DURATION = 40.0  # seconds a piece: two segments
_LAST_ONSET = 38.6  # seconds: nothing starts later, so that the end can ring
TEMPO_CLASSES = {"slow": (50, 89), "medium": (90, 130), "fast": (131, 180)}
_METRE_WEIGHTS = {"4/4": 0.52, "3/4": 0.26, "6/8": 0.22}
_MOODS: dict[tuple[bool, str], tuple[str, ...]] = {
    (True, "slow"): ("peaceful", "tender", "dreamy", "warm", "romantic", "serene"),
    (True, "medium"): ("cheerful", "relaxed", "hopeful", "bright", "carefree", "friendly"),
    (True, "fast"): ("happy", "joyful", "energetic", "playful", "triumphant", "lively"),
    (False, "slow"): ("sad", "melancholic", "mysterious", "sombre", "nostalgic", "lonely"),
    (False, "medium"): ("wistful", "dark", "brooding", "bittersweet", "pensive", "moody"),
    (False, "fast"): ("tense", "urgent", "dramatic", "restless", "fierce", "stormy"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a note is written."""

    style: Style
    metre: Metre
    tempo_class: str
    bpm: int
    key: Key
    density: str
    mood: str
    lead: Instrument
    chords: Instrument
    bass: Instrument
    drums: bool
    pad: bool


def tempo_class(bpm: int) -> str:
    """slow (below 90), medium (90 to 130) or fast (above 130)."""
    return next(name for name, (_, high) in TEMPO_CLASSES.items() if bpm <= high)


def _weight(style: Style, metre: Metre) -> float:
    """How often a style is drawn where it fits: less for one that fits many metres and tempi, so that all are heard."""
    paces = sum(style.tempo[0] <= high - 4 and style.tempo[1] >= low + 4 for low, high in TEMPO_CLASSES.values())
    return style.grooves[metre.name].weight / (len(style.grooves) * paces)


def draw_plan(rng: Random) -> Plan:
    """A plan. Lead family, mode, tonic, tempo class and density are drawn independently of one another."""
    family = rng.choice(list(LEADS))
    lead = rng.choice(LEADS[family])
    key = Key(rng.randrange(12), rng.choice(list(MODES)))
    density = rng.choice(("sparse", "moderate", "dense"))
    pace = rng.choice(list(TEMPO_CLASSES))
    metre = METRES[rng.choices(list(_METRE_WEIGHTS), list(_METRE_WEIGHTS.values()))[0]]
    slowest, quickest = TEMPO_CLASSES[pace]

    def tempi(style: Style) -> range:
        return range(max(slowest, style.tempo[0]), min(quickest, style.tempo[1]) + 1)

    styles = [style for style in STYLES.values() if metre.name in style.grooves and len(tempi(style)) >= 5]
    style = rng.choices(styles, [_weight(style, metre) for style in styles])[0]
    backing = [BACKING[name] for name in style.backing if BACKING[name].family != family]
    basses = [BACKING[name] for name in style.basses if not (family == "strings" and name == "cello")
              and not (family == "brass" and name == "tuba")]
    own = style.moods if style.moods and rng.random() < 0.3 else ()
    groove = style.grooves[metre.name]
    chords = rng.choice(backing or [BACKING["piano"], BACKING["strings"]])
    sustained = chords.family in ("pad", "strings", "synth") or family in ("strings", "synth")
    return Plan(
        style, metre, pace, rng.choice(tempi(style)), key, density,
        mood=rng.choice(own or _MOODS[is_bright(key.mode), pace]), lead=lead, chords=chords,
        bass=rng.choice(basses or [BACKING["acoustic bass"]]), drums=bool(groove.drums) and rng.random() < style.drums,
        pad=not sustained and rng.random() < style.pad)


def _lead_part(rng: Random, plan: Plan, sections: list[Section], chords: list[Chord], slots: int) -> list[Tone]:
    """The melody over the whole form: sections of one letter share their tune, primed ones vary it."""
    metre = plan.metre
    low = plan.key.degree_near(plan.lead.low) + 1
    voice = Voice(plan.key, low, min(plan.key.degree_near(plan.lead.high), low + 11))
    motifs = [draw_motif(rng, metre, plan.density, plan.bpm) for _ in range(4)]
    pairs = {"A": (motifs[0], motifs[1]), "B": (motifs[2], motifs[1]), "C": (motifs[3], motifs[0].inverted())}
    memory: dict[tuple[str, bool], list[Tone]] = {}
    part: list[Tone] = []
    for section in sections:
        letter = section.label[:1]
        span = chords[section.first_bar * slots : (section.first_bar + section.n_bars) * slots]
        if section.label in ("intro", "end"):
            continue
        tones = memory.get((letter, section.closed))
        if tones is None:
            tones = write_phrase(rng, voice, span, metre, pairs.get(letter, pairs["A"]), section.closed, slots)
            other = memory.get((letter, not section.closed))
            if other is not None:  # the same phrase with another cadence
                cut = (section.n_bars - 2) * metre.bar
                tones = [t for t in other if t.start < cut] + [t for t in tones if t.start >= cut]
            memory[letter, section.closed] = tones
        if "'" in section.label:
            tones = vary(rng, tones, voice, 12 if metre.compound else 6)
        part += [Tone(t.start + section.first_bar * metre.bar, t.duration, t.degree) for t in tones]
    end = sections[-1].first_bar * metre.bar
    part.append(Tone(end, metre.bar, voice.chord_tone(part[-1].degree, Chord(0))))
    return part


def _play_lead(rng: Random, plan: Plan, part: list[Tone]) -> list[Note]:
    """The melody as notes: metrical accents, the instrument's articulation, a breath after long notes."""
    notes = []
    for tone in part:
        accent = 8 if tone.start % plan.metre.bar == 0 else 2 if tone.start % TICKS == 0 else -10
        accent += round(8 * math.sin(math.pi * (tone.start / plan.metre.bar % 4) / 4))  # phrases rise and fall
        length = max(1, round(tone.duration * plan.lead.legato)) - (1 if tone.duration >= 2 * TICKS else 0)
        pitch, velocity = plan.key.pitch(tone.degree), 94 + accent + rng.randint(-4, 4)
        stroke = plan.metre.step if plan.bpm < 120 else 2 * plan.metre.step
        if plan.lead.rolls and tone.duration * 5 / plan.bpm > 0.7:  # 5 / bpm: seconds a tick
            notes += [Note(tone.start + tick, stroke, pitch, velocity - (14 if tick else 0))
                      for tick in range(0, tone.duration, stroke)]
        else:
            notes.append(Note(tone.start, length, pitch, velocity))
    return notes


def _finish(notes: list[Note], last: int, end: int) -> tuple[Note, ...]:
    """Drop what starts after the last beat, and let what starts on it ring to the end."""
    kept = [replace(n, duration=end - n.start if n.start == last else min(n.duration, end - n.start))
            for n in notes if n.start <= last]
    return tuple(sorted(kept, key=lambda n: (n.start, n.pitch)))


def compose(seed: int, index: int) -> Piece:
    """Compose piece `index` of corpus `seed`: a pure function of the two (and of this package's version)."""
    rng = Random(f"ssmttm builtin {VERSION} {seed} {index}")
    plan = draw_plan(rng)
    metre, groove = plan.metre, plan.style.grooves[plan.metre.name]
    beat = 60.0 / plan.bpm
    n_bars = int(_LAST_ONSET / (beat * metre.beats)) + 1
    last = (n_bars - 1) * metre.bar
    if (n_bars - 1) * metre.beats * beat < _LAST_ONSET - 2.6:  # a long last bar: the end falls on its second half
        last += metre.beats // 2 * TICKS
    end = round((DURATION - 0.05) / beat * TICKS)
    sections = plan_form(rng, n_bars, beat * metre.beats)
    slots = 2 if metre.beats == 4 and plan.bpm < 96 else 1  # slow bars hold two chords
    slot = metre.bar // slots
    chords = harmonise(rng, sections, plan.key.mode, rng.random() < plan.style.sevenths, slots)
    lead = _play_lead(rng, plan, _lead_part(rng, plan, sections, chords, slots))
    final = lead.pop()
    lead = [note for note in lead if note.start < sections[-1].first_bar * metre.bar]
    if last % metre.bar:  # the last bar's first half leads into the final note
        third = plan.key.pitch(plan.key.degree_near(final.pitch) + 2)
        lead.append(Note(final.start, last - final.start, third, final.velocity))
    lead.append(Note(last, TICKS, final.pitch, final.velocity))
    steady = plan.tempo_class != "medium"
    pattern = arrange.pulsing(rng, groove.chords, metre) if steady else rng.choice(groove.chords)
    voiced = arrange.voicings(chords, plan.key, plan.chords.low)
    backing = arrange.play_chords(voiced, pattern, metre, slot, 72)
    closing = [Note(last, TICKS, pitch, 76) for pitch in voiced[-1]]
    walk = arrange.pulsing(rng, groove.bass, metre) if plan.tempo_class == "slow" else rng.choice(groove.bass)
    bass = arrange.play_bass(chords, plan.key, walk, metre, slot, plan.bass)
    bass = [n for n in bass if n.start < last] + [Note(last, TICKS, bass[0].pitch, 96)]
    parts: list[tuple[Instrument, str, float, list[Note]]] = [
        (plan.lead, "lead", 0.0, lead),
        (plan.chords, "chords", -9.5, [n for n in backing if n.start < last] + closing),
        (plan.bass, "bass", -8.0, bass)]
    if plan.pad:
        parts.append((BACKING["warm synth pad"], "pad", -15.0, arrange.hold_chords(voiced, slot)))
    if plan.drums:
        starts = {section.first_bar for section in sections}
        kit = Instrument("drums", plan.style.kit, "drums", 0, 127)
        hits = arrange.play_drums(rng, rng.choice(groove.drums), metre, n_bars, starts, plan.tempo_class == "slow")
        ending = [Note(last, TICKS, arrange.DRUM_KEYS["c"], 80), Note(last, TICKS, arrange.DRUM_KEYS["k"], 96)]
        parts.append((kit, "drums", -9.0, [n for n in hits if n.start < last] + ending))
    tracks = tuple(Track(who.name, role, who.program, who.family, level,
                         _finish(arrange.swing(notes) if plan.style.swing else notes, last, end))
                   for who, role, level, notes in parts)
    identity = f"builtin-{seed}-{index:06d}"
    form = " ".join(section.label for section in sections)
    truth = {
        "piece": identity, "style": plan.style.name, "bpm": plan.bpm, "tempo_class": plan.tempo_class,
        "key": tonic_name(plan.key.tonic, plan.key.mode), "mode": plan.key.mode, "metre": metre.name, "mood": plan.mood,
        "density": plan.density, "form": form, "drums": plan.drums,
        "lead": {"name": plan.lead.name, "program": plan.lead.program, "family": plan.lead.family},
        "instruments": [{"name": t.name, "role": t.role, "program": t.program, "family": t.family} for t in tracks],
    }
    title = f"{plan.mood.capitalize()} {plan.style.name} in {truth['key']} {plan.key.mode} for {plan.lead.name}"
    return Piece(identity, f"{title}, no. {index}", plan.bpm, metre, tracks, DURATION, truth)
