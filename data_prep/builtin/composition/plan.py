"""The plan of a piece: everything that is decided before a note is written."""

from dataclasses import dataclass
from random import Random

from data_prep.builtin.composition.instruments import BACKING, COUNTERS, LEADS, Instrument
from data_prep.builtin.composition.score import METRES, Metre
from data_prep.builtin.composition.styles import STYLES
from data_prep.builtin.composition.styles.definition import Manner, Style
from data_prep.builtin.composition.styles.manners import MANNERS
from data_prep.builtin.composition.theory import MODES, Key, is_bright

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
_BAND = {"jazz swing", "bossa nova", "rock", "reggae", "country", "funk", "blues", "salsa", "polka"}
_ELECTRONIC = {"techno", "synth-pop", "chiptune"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Style, tempo, key and instruments. `second`, `counter` and `pad` are absent in many pieces."""

    style: Style
    manner: Manner
    metre: Metre
    tempo_class: str
    bpm: int
    key: Key
    density: str
    mood: str
    lead: Instrument
    chords: Instrument
    bass: Instrument
    second: Instrument | None
    counter: Instrument | None
    pad: Instrument | None
    kit: Instrument | None

    @property
    def bar_seconds(self) -> float:
        """The length of a bar."""
        return 60.0 / self.bpm * self.metre.beats

    @property
    def roles(self) -> frozenset[str]:
        """The accompanying parts of the piece."""
        optional = {"second": self.second, "counter": self.counter, "pad": self.pad, "drums": self.kit}
        return frozenset({"chords", "bass"} | {role for role, instrument in optional.items() if instrument})


def tempo_class(bpm: int) -> str:
    """slow (below 90), medium (90 to 130) or fast (above 130)."""
    return next(name for name, (_, high) in TEMPO_CLASSES.items() if bpm <= high)


def _weight(style: Style, metre: Metre) -> float:
    """How often a style is drawn where it fits: less for one that fits many metres and tempi, so that all occur."""
    paces = sum(style.tempo[0] <= high - 4 and style.tempo[1] >= low + 4 for low, high in TEMPO_CLASSES.values())
    return style.grooves[metre.name].weight / (len(style.grooves) * paces)


def _tempi(style: Style, pace: str) -> range:
    """The tempi of a style within a tempo class."""
    slowest, quickest = TEMPO_CLASSES[pace]
    return range(max(slowest, style.tempo[0]), min(quickest, style.tempo[1]) + 1)


def _draw_style(rng: Random, pace: str) -> tuple[Style, Metre]:
    metre = METRES[rng.choices(list(_METRE_WEIGHTS), list(_METRE_WEIGHTS.values()))[0]]
    styles = [style for style in STYLES.values() if metre.name in style.grooves and len(_tempi(style, pace)) >= 5]
    return rng.choices(styles, [_weight(style, metre) for style in styles])[0], metre


def _draw_bass(rng: Random, style: Style, family: str) -> Instrument:
    basses = [BACKING[name] for name in style.basses if not (family == "strings" and name == "cello")
              and not (family == "brass" and name == "tuba")]
    return rng.choice(basses or [BACKING["acoustic bass"]])


def _draw_others(rng: Random, style: Style, manner: Manner, taken: set[str]) -> tuple[Instrument | None, ...]:
    """A second accompaniment, a counter-melody and a pad, each of a family not yet taken, or None."""
    sustained = bool(taken & {"pad", "strings", "synth"})
    second = [BACKING[name] for name in manner.colours if BACKING[name].family not in taken]
    chosen = rng.choice(second) if second and rng.random() < 0.55 else None
    taken = taken | ({chosen.family} if chosen else set())
    kind = "electronic" if style.name in _ELECTRONIC else "band" if style.name in _BAND else "acoustic"
    counters = [who for who in COUNTERS[kind] if who.family not in taken]
    counter = rng.choice(counters) if counters and rng.random() < manner.counter else None
    busy = sustained or (chosen is not None and chosen.family in ("pad", "strings", "synth"))
    pad = BACKING["warm synth pad"] if not busy and rng.random() < style.pad else None
    return chosen, counter, pad


def draw_plan(rng: Random) -> Plan:
    """A plan. Lead family, mode, tonic, tempo class and density are drawn independently of one another."""
    family = rng.choice(list(LEADS))
    lead = rng.choice(LEADS[family])
    key = Key(rng.randrange(12), rng.choice(list(MODES)))
    density = rng.choice(("sparse", "moderate", "dense"))
    pace = rng.choice(list(TEMPO_CLASSES))
    style, metre = _draw_style(rng, pace)
    manner = MANNERS[style.name]
    backing = [BACKING[name] for name in style.backing if BACKING[name].family != family]
    chords = rng.choice(backing or [BACKING["piano"], BACKING["strings"]])
    bass = _draw_bass(rng, style, family)
    own = style.moods if style.moods and rng.random() < 0.3 else ()
    second, counter, pad = _draw_others(rng, style, manner, {family, chords.family, bass.family})
    drums = bool(style.grooves[metre.name].drums) and rng.random() < style.drums
    return Plan(
        style, manner, metre, pace, rng.choice(_tempi(style, pace)), key, density,
        mood=rng.choice(own or _MOODS[is_bright(key.mode), pace]), lead=lead, chords=chords, bass=bass, second=second,
        counter=counter, pad=pad, kit=Instrument("drums", rng.choice(manner.kits), "drums", 0, 127) if drums else None)
