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
    2: ("A A'", "A B", "A A", "A A"),
    3: ("A A' B", "A B A'", "A B A", "A A B", "A B B"),
    4: ("A A' B A", "A B A B", "A A B A'", "A A B B'", "A B A C"),
    5: ("A A' B A A'", "A B A B B'", "A A B B A'", "A A B A B"),
    6: ("A A B B' A A'", "A B A C A B", "A A' B A C B"),
    7: ("A B A C A B A'", "A A' B A A' B A"),
    8: ("A A' B B' A A' B A'", "A B A C A B A C'"),
}


@dataclass(frozen=True, slots=True)
class Section:
    """A run of bars: `label` is intro, A, A', B, ..., break, coda or end; `closed` means that it ends on the tonic."""

    label: str
    first_bar: int
    n_bars: int
    closed: bool = True


def _intro_bars(rng: Random, n_bars: int, phrase: int, bar_seconds: float) -> int:
    """The length of the introduction: at most 4.6 s, and such that few bars are left over after the phrases."""
    most = min(4, int(4.6 / bar_seconds), n_bars - 1 - phrase)
    lengths = [bars for bars in (0, 1, 2, 4) if bars <= most] or [0]
    weights = [(1.0 if bars else 0.6) / (1 + (n_bars - 1 - bars) % phrase) for bars in lengths]
    return rng.choices(lengths, weights)[0]


def _break_bars(rng: Random, spare: int, count: int, bar_seconds: float) -> int:
    """The length of a break before the last phrase: at most 3.6 s, in some pieces of three phrases or more."""
    bars = min(spare, 2 if bar_seconds <= 1.8 else 1)
    return bars if count >= 3 and bars * bar_seconds <= 3.6 and rng.random() < 0.7 else 0


def plan_form(rng: Random, n_bars: int, bar_seconds: float) -> list[Section]:
    """Lay `n_bars` bars out as intro, phrases (a break before the last one), coda and a last bar of tonic."""
    phrase = 8 if n_bars >= 26 else 4
    intro = _intro_bars(rng, n_bars, phrase, bar_seconds)
    count = min((n_bars - 1 - intro) // phrase, 8)
    pause = _break_bars(rng, n_bars - 1 - intro - count * phrase, count, bar_seconds)
    labels = rng.choice(_FORMS[count]).split()
    sections = [Section("intro", 0, intro)] if intro else []
    bar = intro
    for i, label in enumerate(labels):
        if pause and i == len(labels) - 1:
            sections.append(Section("break", bar, pause, closed=False))
            bar += pause
        following = labels[i + 1] if i + 1 < len(labels) else ""
        opened = following[:1] == label[:1] and rng.random() < 0.45
        sections.append(Section(label, bar, phrase, closed=not opened))
        bar += phrase
    if bar < n_bars - 1:
        sections.append(Section("coda", bar, n_bars - 1 - bar))
    return [*sections, Section("end", n_bars - 1, 1)]


def _draw(rng: Random, weights: dict[int, int]) -> int:
    return rng.choices(list(weights), list(weights.values()))[0]


def _vamp(rng: Random, mode: str, n_bars: int, period: int) -> list[int]:
    """Chord roots that go to and fro between the tonic and one other chord, each for half a period."""
    other = _draw(rng, {root: w for root, w in (_PREPARE[mode] | _DOMINANT[mode]).items() if root})
    return [0 if i % period < period // 2 else other for i in range(n_bars)]


def phrase_roots(rng: Random, mode: str, n_bars: int, closed: bool, start_on_tonic: bool,
                 vamp: float = 0.0) -> list[int]:
    """Chord roots of a phrase: tonic, departure, and a cadence (closed: dominant to tonic; open: a half cadence).

    With probability `vamp` the bars before the cadence go to and fro between two chords; otherwise the second half
    of a long phrase may begin as the first.
    """
    if rng.random() < vamp:
        roots = _vamp(rng, mode, n_bars, rng.choice((2, 4) if n_bars >= 8 else (2,)))
        ending = [_draw(rng, _DOMINANT[mode]), 0] if closed else [_draw(rng, _HALF[mode])]
        return _confirm(rng, roots[: n_bars - len(ending)] + ending, mode)
    roots = _progression(rng, mode, n_bars, closed, start_on_tonic)
    if n_bars >= 7 and start_on_tonic and rng.random() < 0.6:
        half = (n_bars + 1) // 2
        roots[half : half + 2] = roots[:2]
    return _confirm(rng, roots, mode)


def _progression(rng: Random, mode: str, n_bars: int, closed: bool, start_on_tonic: bool) -> list[int]:
    """Roots by function: tonic, preparation and dominant."""
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
    return roots


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


def harmonise(rng: Random, sections: list[Section], mode: str, sevenths: bool, slots: int = 1,
              vamp: float = 0.0) -> list[Chord]:
    """`slots` chords a bar for the whole form; sections of one letter share their harmony up to the cadence.

    A phrase's last bar holds one chord, so that its cadence can rest.
    """
    chords: list[Chord] = []
    memory: dict[tuple[str, bool], list[int]] = {}
    for section in sections:
        letter, count = section.label[:1], section.n_bars * slots
        if section.label in ("intro", "end"):
            roots = [0] * count
        elif section.label in ("coda", "break"):
            tail = [_draw(rng, _PREPARE[mode]), 0, _draw(rng, _PREPARE[mode]), _draw(rng, _DOMINANT[mode])]
            roots = (tail * 4)[-count:]
        elif (letter, section.closed) in memory:
            roots = memory[letter, section.closed]
        else:
            start_on_tonic = letter != "B" or rng.random() < 0.5
            roots = phrase_roots(rng, mode, count - slots + 1, section.closed, start_on_tonic, vamp)
            roots += roots[-1:] * (slots - 1)
            other = memory.get((letter, not section.closed))
            if other is not None:
                roots = other[: count - 2 * slots] + roots[-2 * slots :]
            memory[letter, section.closed] = roots
        final = section is sections[-2]
        chords += [colour(root, mode, sevenths, section.label == "end" or (final and i >= count - 1 - slots))
                   for i, root in enumerate(roots)]
    return chords
