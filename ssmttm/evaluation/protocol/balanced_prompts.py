"""Held-out captions that mention the lead's family, the tempo and the mode, balanced over all three.

A caption mentions an attribute if it contains one of the words below for the segment's true class, and none for another
tempo or mode. (In the built-in corpus no accompaniment is of the lead's family, except basses and pads.)
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, annotations_of, expected_labels
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
    """A caption, the store's row that it describes, and the true class of each attribute."""

    caption: str
    row: int
    expected: dict[str, str]


def mentioned_attributes(caption: str, expected: dict[str, str]) -> set[str]:
    """The attributes of a segment (`expected_labels`) that its caption mentions without contradiction."""
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


def names_key(caption: str, annotations: Mapping[str, Any]) -> bool:
    """Whether a caption names the tonic with its mode, as "in Bb minor" or "B-flat minor"."""
    letter, accidental, mode = annotations["key"][0], annotations["key"][1:], annotations["mode"]
    spelt = {"": "", "#": "(?:#|[ -]sharp)", "b": "(?:b|[ -]flat)"}[accidental]
    named, alone = rf"(?<![\w-]){letter}{spelt} {mode}", rf"{mode} mode on {letter}{spelt}(?![\w#-]| sharp| flat)"
    return bool(re.search(f"{named}|{alone}", caption))


def balanced_prompts(store: Store, n: int, seed: int, split: str = "test", one_per_track: bool = False) -> list[Prompt]:
    """Choose n captions of a split (or of `all`) that mention all three attributes, each class about equally often.

    A segment, or with `one_per_track` a track, is used twice only when all are used.
    """
    rows = np.arange(len(store)) if split == "all" else store.indices(split)
    candidates = list(_candidates(store, rows))
    if len(candidates) < n:
        raise UserError(
            f"{store.path} has {len(candidates)} {split} captions that mention lead, tempo and mode, fewer than {n}: "
            "use fewer prompts, or prepare more hours of the built-in corpus"
        )
    tracks = store.manifest["track"].to_pylist() if one_per_track else None
    order = np.random.default_rng(seed).permutation(len(candidates))
    remaining = [candidates[i] for i in order]
    counts: Counter[tuple[str, str]] = Counter()
    used: Counter[Any] = Counter()
    chosen: list[Prompt] = []

    def unit(prompt: Prompt) -> Any:
        return prompt.row if tracks is None else tracks[prompt.row]

    def cost(prompt: Prompt) -> tuple[int, int]:
        return used[unit(prompt)], sum(counts[name, prompt.expected[name]] * _SIZES[name] for name in ATTRIBUTES)

    for _ in tqdm(range(n), desc="choosing prompts", unit="prompt", leave=False):
        best = min(remaining, key=cost)
        remaining.remove(best)
        chosen.append(best)
        used[unit(best)] += 1
        counts.update((name, best.expected[name]) for name in ATTRIBUTES)
    return chosen


def _candidates(store: Store, rows: np.ndarray) -> Iterator[Prompt]:
    for row in rows.tolist():
        expected = expected_labels(annotations_of(store, row))
        for caption in store.captions(row):
            if mentioned_attributes(caption, expected) == set(ATTRIBUTES):
                yield Prompt(caption, row, expected)


@cache
def _words(pattern: str) -> re.Pattern[str]:
    """Match any of the whole words, in any case, with an optional plural s."""
    return re.compile(rf"(?<![\w-])(?:{pattern})s?(?![\w-])", re.IGNORECASE)
