"""Form and harmony: how many phrases, their labels, and one or two chords a bar with real cadences."""

from dataclasses import dataclass
from random import Random

from data_prep.builtin.composition.theory import CHARACTERISTIC, Chord

# Chord roots by function and mode, with weights. The dorian sixth is in IV and ii,
# the mixolydian seventh in VII and v.
_TONIC = {"major": {0: 7, 5: 2, 2: 1}, "minor": {0: 7, 5: 2, 2: 1}, "dorian": {0: 7, 2: 1}, "mixolydian": {0: 7, 5: 1}}
_PREPARE = {"major": {3: 4, 1: 3}, "minor": {3: 4, 5: 2}, "dorian": {3: 6, 1: 2}, "mixolydian": {3: 4, 6: 2}}
_DOMINANT = {"major": {4: 1}, "minor": {4: 3, 6: 2}, "dorian": {3: 4, 6: 2, 4: 1}, "mixolydian": {6: 5, 4: 2}}
_HALF = {"major": {4: 1}, "minor": {4: 2, 6: 2}, "dorian": {3: 3, 6: 2, 4: 1}, "mixolydian": {6: 3, 3: 1, 4: 1}}

_FORMS: dict[int, tuple[str, ...]] = {
    1: ("A",),
    2: ("A A'", "A B"),
    3: ("A A' B", "A B A'", "A B A"),
    4: ("A A' B A", "A B A B'", "A A' B A'", "A B A C"),
    5: ("A A' B A A'", "A B A' B A", "A A B B' A'"),
    6: ("A A' B B' A A'", "A B A C A B", "A A' B A C A'"),
    7: ("A B A C A B A'", "A A' B A A' B A"),
    8: ("A A' B B' A A' B A'", "A B A C A B A C'"),
}


@dataclass(frozen=True, slots=True)
class Section:
    """A run of bars: `label` is intro, A, A', B, ..., coda or end; `closed` means that it ends on the tonic."""

    label: str
    first_bar: int
    n_bars: int
    closed: bool = True


def plan_form(rng: Random, n_bars: int, bar_seconds: float) -> list[Section]:
    """Lay `n_bars` bars out as intro, phrases, coda and a last bar of tonic."""
    phrase = 8 if n_bars >= 26 else 4
    most = 1 if bar_seconds < 2.3 else 0
    intro = rng.randint(0, most)
    count = (n_bars - 1 - intro) // phrase
    labels = rng.choice(_FORMS[min(count, 8)]).split()
    sections = [Section("intro", 0, intro)] if intro else []
    bar = intro
    for i, label in enumerate(labels):
        following = labels[i + 1] if i + 1 < len(labels) else ""
        opened = following[:1] == label[:1] and rng.random() < 0.6
        sections.append(Section(label, bar, phrase, closed=not opened))
        bar += phrase
    if bar < n_bars - 1:
        sections.append(Section("coda", bar, n_bars - 1 - bar))
    return [*sections, Section("end", n_bars - 1, 1)]


def _draw(rng: Random, weights: dict[int, int]) -> int:
    return rng.choices(list(weights), list(weights.values()))[0]


def phrase_roots(rng: Random, mode: str, n_bars: int, closed: bool, start_on_tonic: bool) -> list[int]:
    """Chord roots of a phrase: tonic, departure, and a cadence (closed: dominant to tonic; open: a half cadence)."""
    roots: list[int] = []
    function = "T" if start_on_tonic else "S"
    for bar in range(n_bars):
        left = n_bars - bar
        if closed and left == 1:
            roots.append(0)
        elif closed and left == 2:
            roots.append(_draw(rng, _DOMINANT[mode]))
        elif left == 1:
            roots.append(_draw(rng, _HALF[mode]))
        elif n_bars >= 8 and left == 5:  # the middle of a long phrase rests on a half cadence or on the tonic
            roots.append(0 if rng.random() < 0.5 else _draw(rng, _HALF[mode]))
        else:
            pool = {"T": _TONIC, "S": _PREPARE, "D": _DOMINANT}[function][mode]
            first = bar == 0 and start_on_tonic
            choices = {root: weight for root, weight in pool.items() if not roots or root != roots[-1]} or pool
            roots.append(0 if first else _draw(rng, choices))
        function = {"T": rng.choice("SSD"), "S": rng.choice("DDTT"), "D": "T"}[function]
    return _confirm(rng, roots, mode)


def _confirm(rng: Random, roots: list[int], mode: str) -> list[int]:
    """Ensure that every four chords contain the tonic and a chord with the mode's characteristic degree."""
    characteristic = {root: weight for root, weight in (_PREPARE[mode] | _DOMINANT[mode]).items()
               if CHARACTERISTIC[mode] in Chord(root).degrees}
    for first in range(0, len(roots) - 3, 4):
        if 0 not in roots[first : first + 4]:
            roots[first] = 0
        if not set(characteristic) & set(roots[first : first + 4]):
            away = [i for i in range(first + 1, first + 4) if roots[i] != 0] or [first + 1]
            roots[rng.choice(away)] = _draw(rng, characteristic)
    return roots


def colour(root: int, mode: str, sevenths: bool, cadential: bool) -> Chord:
    """The chord on a root. A cadential dominant in minor takes the leading note."""
    leading = mode == "minor" and root == 4 and cadential
    return Chord(root, sevenths and not (root == 0 and cadential), leading)


def harmonise(rng: Random, sections: list[Section], mode: str, sevenths: bool, slots: int = 1) -> list[Chord]:
    """`slots` chords a bar for the whole form; sections of one letter share their harmony up to the cadence.

    A phrase's last bar holds one chord, so that its cadence can rest.
    """
    chords: list[Chord] = []
    memory: dict[tuple[str, bool], list[int]] = {}
    for section in sections:
        letter, count = section.label[:1], section.n_bars * slots
        if section.label in ("intro", "end"):
            roots = [0] * count
        elif section.label == "coda":
            tail = [_draw(rng, _PREPARE[mode]), 0, _draw(rng, _PREPARE[mode]), _draw(rng, _DOMINANT[mode])]
            roots = (tail * 4)[-count:]
        elif (letter, section.closed) in memory:
            roots = memory[letter, section.closed]
        else:
            start_on_tonic = letter != "B" or rng.random() < 0.5
            roots = phrase_roots(rng, mode, count - slots + 1, section.closed, start_on_tonic)
            roots += roots[-1:] * (slots - 1)
            other = memory.get((letter, not section.closed))
            if other is not None:
                roots = other[: count - 2 * slots] + roots[-2 * slots :]
            memory[letter, section.closed] = roots
        final = section is sections[-2]
        chords += [colour(root, mode, sevenths, section.label == "end" or (final and i >= count - 1 - slots))
                   for i, root in enumerate(roots)]
    return chords
