"""Captions from tags by templates."""

import re
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from data_prep.builtin.captions import article, listed
from data_prep.stages.captions.tag_words import (
    CATEGORIES,
    GENRES,
    INSTRUMENTS,
    MOODS,
    PROPER_ADJECTIVES,
    TEMPI,
    USES,
    VOCALS,
)

_MAX_WORDS = (2, 4, 2, 1, 1, 1, 1)  # per group of TagWords in one caption
_PLAIN_NAME = re.compile(r"\w(?:[\w&'’+#♭♯ -]|\.(?=\w))*")
_WITH_INSTRUMENTS = (
    "{np} with {players}", "{np} featuring {players}", "{np} with {players} in it", "{bare} with {players}",
    "{np} built around {players}", "This is {np} with {players}", "{np} in which one hears {players}",
    "{bare} that features {players}",
)  # fmt: skip
_WITHOUT_INSTRUMENTS = ("{np}", "{bare}", "This is {np}", "{bare}", "{np}")
_NOUNS = ("piece", "track", "composition", "piece of music")


class TagWords(NamedTuple):
    """Tags as English words; instruments and uses have their articles."""

    genres: list[str]
    instruments: list[str]
    moods: list[str]
    uses: list[str]
    tempo: list[str]  # adjectives
    bpm: list[str]
    key: list[str]


def template_captions(tags: Iterable[str], id: str, n: int = 3, instrumental: bool = False) -> list[str]:
    """Up to `n` different captions from tags; the first one uses as many tags as fit.

    Args:
        tags: `category---name` with genre, instrument, mood/theme, tempo, bpm and key; others are ignored.
        id: seed.
        instrumental: ignore tags of vocals.
    """
    words = _tag_words(tags, instrumental)
    if not any(words):
        return []
    rng = Random(f"caption {id}")
    captions: dict[str, str] = {}  # by text without final dot and case
    for attempt in range(4 * n):
        text = _write(rng, _sample(words, rng, all_groups=attempt == 0), sentence=attempt == 0)
        if len(captions) < n:
            captions.setdefault(text.rstrip(".").lower(), text)
    return list(captions.values())


def _tag_words(tags: Iterable[str], instrumental: bool) -> TagWords:
    words = TagWords([], [], [], [], [], [], [])
    for tag in tags:
        category, _, name = tag.partition("---")
        name = re.sub(r"\s*/\s*", " and ", " ".join(name.replace("_", " ").split()).lower())
        kind = CATEGORIES.get(category.strip().lower())
        if kind and len(name) <= 40 and _PLAIN_NAME.fullmatch(name) and not (instrumental and name in VOCALS):
            group, text = _group_and_words(kind, name)
            if text and text not in getattr(words, group):
                getattr(words, group).append(text)
    return words


def _group_and_words(kind: str, name: str) -> tuple[str, str]:
    """The field of `TagWords` for a tag, and its words; empty words if the tag is not understood."""
    spaced = " ".join(word.capitalize() if word in PROPER_ADJECTIVES else word for word in name.split())
    if kind == "genre":
        return "genres", GENRES.get(name, spaced)
    if kind == "instrument":
        plural = name.endswith("s") and not name.endswith(("ss", "bass", "brass"))
        return "instruments", INSTRUMENTS.get(name, spaced if plural else article(spaced))
    if kind == "key":
        found = re.fullmatch(r"([a-g])([#b♯♭]?) ?(major|minor)", name)
        return "key", f"{found[1].upper()}{found[2]} {found[3]}" if found else ""
    if kind == "tempo" and (number := re.fullmatch(r"(\d{2,3})(?:\.\d+)?(?: ?bpm)?", name)):
        return "bpm", f"{number[1]} bpm"
    if name in TEMPI or (kind == "tempo" and name.isalpha()):
        return "tempo", spaced
    if kind == "tempo":
        return "tempo", ""
    return ("uses", USES[name]) if name in USES else ("moods", MOODS.get(name, spaced))


def _sample(words: TagWords, rng: Random, all_groups: bool) -> TagWords:
    """A few words of each group; without `all_groups` some groups are dropped, but never all."""
    limits = [min(len(group), most) for group, most in zip(words, _MAX_WORDS, strict=True)]
    chosen = TagWords(*(rng.sample(group, limit) for group, limit in zip(words, limits, strict=True)))
    if not all_groups:
        some = [group if rng.random() < 0.65 else [] for group in chosen]
        chosen = TagWords(*some) if any(some) else chosen
    plain = [genre for genre in chosen.genres if " and " not in genre]
    return chosen._replace(genres=plain if len(plain) == 2 else chosen.genres[:1])


def _write(rng: Random, words: TagWords, sentence: bool) -> str:
    """A caption with all of the words; unless `sentence`, sometimes a plain list."""
    if not sentence and rng.random() < 0.15 and sum(map(len, words)) > 1:
        items = [re.sub(r"^an? ", "", word) for group in words[:3] for word in group] + words.tempo + words.bpm
        return ", ".join([*items, *(f"for {use}" for use in words.uses), *words.key])
    mood_apart = bool(words.moods) and rng.random() < 0.25
    adjectives = [*words.tempo, *([] if mood_apart else words.moods)]
    rng.shuffle(adjectives)
    kind = " ".join([", ".join(adjectives), listed(words.genres) if words.genres else ""]).strip()
    key_and_tempo = "".join([*(f" in {key}" for key in words.key), *(f" at {bpm}" for bpm in words.bpm)])
    noun = rng.choice(_NOUNS)
    slots = {"np": article(f"{kind} {noun}".strip()) + key_and_tempo, "bare": f"{kind} music".strip() + key_and_tempo}
    if words.instruments:
        slots["players"] = listed(words.instruments)
    text = rng.choice(_WITH_INSTRUMENTS if words.instruments else _WITHOUT_INSTRUMENTS).format(**slots)
    for use in words.uses:
        text += rng.choice((f" for {use}", f", fit for {use}", f", made for {use}", f". It would suit {use}"))
    if mood_apart:
        text += rng.choice((f"; the mood is {listed(words.moods)}", f". It sounds {listed(words.moods)}"))
    return text[0].upper() + text[1:] + rng.choice((".", ".", "")) if rng.random() < 0.75 or ". " in text else text
