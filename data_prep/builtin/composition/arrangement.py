"""The arrangement over time: which parts play in which bar and how strongly, fills, breaks and the sections' names."""

from dataclasses import dataclass
from random import Random

from data_prep.builtin.composition.harmony import Section

_NAMES = {
    "song": {"A": "verse", "B": "chorus", "C": "bridge"},
    "tune": {"A": "first theme", "B": "second theme", "C": "third theme"},
    "layers": {"A": "first part", "B": "second part", "C": "third part"},
}
# From which energy on a part plays; `light` drums play less than `drums`.
_ENTRY = {"bass": 0.35, "light": 0.45, "pad": 0.5, "second": 0.6, "drums": 0.65, "counter": 0.75}
_SWELL = 8.0  # dB between energies 0 and 1


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its section and its place there, the parts that play, and their energy from 0 to 1.

    `fill`: the drums lead into the next section. `stop`: the accompaniment is silent in the second half.
    """

    section: Section
    place: int
    parts: frozenset[str]
    energy: float
    fill: bool = False
    stop: bool = False

    @property
    def key(self) -> str:
        """The same for bars that repeat one another."""
        return f"{self.section.label[:1]}{self.place}"

    @property
    def opens(self) -> bool:
        """Whether a section starts here."""
        return self.place == 0


def section_name(label: str, build: str) -> str:
    """What a section is called, such as "verse"; primes are left out."""
    return _NAMES[build].get(label[:1], label)


def swell(bars: list[Bar]) -> list[float]:
    """The loudness of each bar in dB against the strongest passages; the note velocities add to it."""
    return [_SWELL * (bar.energy - 1.0) for bar in bars]


def slot_keys(bars: list[Bar], slots: int) -> list[str]:
    """The same for those of the `slots` parts of a bar that repeat one another."""
    return [f"{bar.key} {slot}" for bar in bars for slot in range(slots)]


def _energies(rng: Random, sections: list[Section], build: str) -> list[float]:
    """The energy of each section: a song's chorus is stronger than its verse, the other kinds grow."""
    phrases = [i for i, section in enumerate(sections) if section.label[0] in "ABC"]
    levels = [0.5] * len(sections)
    for order, i in enumerate(phrases):
        grown = order / max(1, len(phrases) - 1)
        if build == "song":
            level = {"A": 0.54, "B": 0.9, "C": 0.62}[sections[i].label[0]]
        else:
            level = (0.4 if build == "layers" else 0.55) + 0.6 * grown
        repeats = order and sections[i].label == sections[phrases[order - 1]].label and rng.random() < 0.75
        levels[i] = levels[phrases[order - 1]] if repeats else min(1.0, level)
    if len(phrases) > 3 and build != "song" and rng.random() < 0.5:
        levels[phrases[-2]] = 0.5  # a quiet part before the last one
    levels[phrases[-1]] = max(levels[phrases[-1]], 0.9)
    for i, section in enumerate(sections):
        if section.label in ("intro", "break"):
            levels[i] = 0.85  # what plays alone plays out
        elif section.label in ("coda", "end"):
            levels[i] = max(0.66, levels[i - 1] - 0.08)
    return levels


def _playing(roles: frozenset[str], energy: float) -> frozenset[str]:
    """The parts that play at an energy."""
    playing = {part for part, entry in _ENTRY.items() if energy >= entry and part in roles | {"light"}}
    if "drums" not in roles or "drums" in playing:
        playing.discard("light")
    return frozenset(playing | {"chords"})


def _intro(rng: Random, roles: frozenset[str], bars: int) -> list[frozenset[str]]:
    """The parts of an introduction, which enter one after the other."""
    entries = [({"chords"}, {"chords", "bass"}), ({"chords"}, {"chords", "pad", "bass"} & roles)]
    if "drums" in roles:
        entries += [({"bass", "drums"}, {"bass", "drums", "chords"}), ({"chords"}, {"chords", "drums"})]
    first, then = rng.choice(entries)
    return [frozenset(first), *[frozenset(then)] * (bars - 1)][:bars]


def _break(rng: Random, roles: frozenset[str]) -> frozenset[str]:
    """The few parts of a break."""
    choices = [{"chords", "bass"}, {"chords", "pad", "second"} & roles]
    choices += [{"drums", "bass"}] * 2 if "drums" in roles else []
    return frozenset(rng.choice(choices))


def arrange(rng: Random, sections: list[Section], roles: frozenset[str], build: str) -> list[Bar]:
    """One `Bar` for each bar of the form."""
    bars: list[Bar] = []
    for section, energy in zip(sections, _energies(rng, sections, build), strict=True):
        playing = [_playing(roles, energy)] * section.n_bars
        if section.label == "intro":
            playing = _intro(rng, roles, section.n_bars)
        elif section.label == "break":
            playing = [_break(rng, roles)] * section.n_bars
        elif build == "layers" and section.n_bars >= 4:  # one more part in the second half
            playing[section.n_bars // 2 :] = [_playing(roles, energy + 0.16)] * (section.n_bars - section.n_bars // 2)
        bars += [Bar(section, place, parts, energy) for place, parts in enumerate(playing)]
    return _transitions(rng, bars)


def _transitions(rng: Random, bars: list[Bar]) -> list[Bar]:
    """Add fills and stops before new sections."""
    done: list[Bar] = []
    for bar, following in zip(bars, [*bars[1:], bars[-1]], strict=True):
        changes = following.opens and following is not bar and bar.section.label not in ("intro", "end")
        rises = following.energy > bar.energy + 0.1
        fill = changes and rng.random() < (0.95 if rises else 0.7)
        stop = fill and bar.section.label != "break" and rng.random() < (0.3 if rises else 0.08)
        done.append(Bar(bar.section, bar.place, bar.parts, bar.energy, fill, stop))
    return done
