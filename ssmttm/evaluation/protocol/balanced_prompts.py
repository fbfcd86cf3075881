"""Held-out captions that name the lead's family, the tempo and the mode, balanced over all three.

A caption names an attribute if it holds one of the words below for the segment's true value, and none for another tempo
or mode. (The built-in corpus never accompanies a lead by an instrument of its own family, but for basses and pads.)
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from tqdm import tqdm

from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, expected_of, truth_of
from ssmttm.evaluation.attributes.classifiers import MODES, TEMPO_CLASSES, tempo_class

FAMILY_WORDS = {
    "piano": r"pianos?|rhodes|harpsichord|clavinet",
    "mallets": r"celest[ae]|glockenspiel|music box|vibraphone|vibes|marimba|xylophone|tubular bells|mallet instrument",
    "organ": r"(?:hammond|church|pipe|reed|drawbar)? ?organ|harmonium|accordion|squeezebox",
    "guitar": r"(?<!bass )guitar|banjo|ukulele",
    "strings": r"violin|viola|cello|fiddle|strings?|string (?:section|ensemble|orchestra)",
    "brass": r"trumpet|trombone|horn|tuba|brass",
    "reeds": r"sax|saxophone|oboe|bassoon|clarinet|reed instrument|english horn|cor anglais",
    "flutes": r"piccolo|flute|flute-like|recorder|panpipes?|whistle|ocarina",
    "synth": r"synth(?! (?:bass|pad))|synthesi[sz]er|polysynth",
}
TEMPO_WORDS = {
    "slow": r"slow|slow-\w+|unhurried|leisurely|adagio|largo",
    "medium": r"mid-tempo|medium|medium-\w+|moderate|moderately paced|moderato|andante",
    "fast": r"fast|fast-\w+|quick|up-?tempo|brisk|rapid|allegro|presto",
}
_SIZES = {"family": len(FAMILY_WORDS), "tempo_class": len(TEMPO_CLASSES), "mode": len(MODES)}
_BPM = re.compile(r"(\d{2,3}) ?(?:bpm|beats (?:per|a) minute)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A caption to generate from, the store's row that it describes, and what the detectors should answer."""

    caption: str
    row: int
    expected: dict[str, str]


def named(caption: str, expected: dict[str, str]) -> set[str]:
    """Which attributes of a segment (`expected_of` its truth) its caption names without contradiction."""
    found = set()
    if _words(FAMILY_WORDS[expected["family"]]).search(caption):
        found.add("family")
    tempi = {name for name in TEMPO_CLASSES if _words(TEMPO_WORDS[name]).search(caption)}
    tempi |= {tempo_class(float(bpm)) for bpm in _BPM.findall(caption)}
    if tempi == {expected["tempo_class"]}:
        found.add("tempo_class")
    if {mode for mode in MODES if _words(mode).search(caption)} == {expected["mode"]}:
        found.add("mode")
    return found


def balanced_prompts(store: Store, n: int, seed: int, split: str = "test") -> list[Prompt]:
    """Choose n captions of a split that name all three attributes, each value of each attribute about equally often.

    Segments come before second captions of segments already chosen.

    Raises:
        UserError: the split has too few such captions.
    """
    candidates = list(_candidates(store, store.indices(split)))
    if len(candidates) < n:
        raise UserError(
            f"{store.path} has {len(candidates)} {split} captions that name lead, tempo and mode, fewer than {n}: "
            "ask for fewer prompts, or prepare more hours of the built-in corpus"
        )
    order = np.random.default_rng(seed).permutation(len(candidates))
    left = [candidates[i] for i in order]
    counts: Counter[tuple[str, str]] = Counter()
    used: Counter[int] = Counter()
    chosen: list[Prompt] = []

    def cost(prompt: Prompt) -> tuple[int, int]:
        return used[prompt.row], sum(counts[name, prompt.expected[name]] * _SIZES[name] for name in ATTRIBUTES)

    for _ in tqdm(range(n), desc="choosing prompts", unit="prompt", leave=False):
        best = min(left, key=cost)
        left.remove(best)
        chosen.append(best)
        used[best.row] += 1
        counts.update((name, best.expected[name]) for name in ATTRIBUTES)
    return chosen


def _candidates(store: Store, rows: np.ndarray) -> Iterator[Prompt]:
    for row in rows.tolist():
        expected = expected_of(truth_of(store, row))
        for caption in store.captions(row):
            if named(caption, expected) == set(ATTRIBUTES):
                yield Prompt(caption, row, expected)


@cache
def _words(pattern: str) -> re.Pattern[str]:
    """Any of the words, whole; a capital or a plural s does not matter."""
    return re.compile(rf"(?<![\w-])(?:{pattern})s?(?![\w-])", re.IGNORECASE)
