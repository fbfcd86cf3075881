"""Captions from the ground truth: varied English, every statement true."""

from random import Random
from typing import Any

from data_prep.builtin.composition.theory import MODES, NOTE_NAMES, pitch_class
from data_prep.builtin.words import (
    BACKING_WORDS,
    DENSITY,
    FAMILY_WORDS,
    INSTRUMENTS,
    METRE_WORDS,
    MOODS,
    STYLE_NOUNS,
    TEMPO,
)

# Slots: np (article, adjectives, style noun), key, lead ("on a flute"), instrument ("a flute"), solo ("flute"), bpm,
# metre, backing, style, tempo, mood, feel. No adjective occurs twice in one caption: `np` holds the others.
_CORE = (
    "{np} {key} on {instrument}", "{np} {key} {lead}", "{np} {lead}, {key}", "{np} {key}, {bpm}, {lead}",
    "{np} for {solo} {key}", "{np} {lead}", "{np} {key} for {solo}, {bpm}",
)
_DETAIL = (
    "{np} {key} {lead}, {backing}", "{np} {bpm} {metre}, {key}, {lead}, {backing}",
    "{Instrument} carries the melody of {np} {key}, {backing}",
    "{np} {metre} {bpm}. {Instrument} leads, {backing}. The piece is {key}",
    "{Np} {key}. {Instrument} takes the lead {backing}", "An instrumental: {np} {lead}, {key}, {backing}",
    "{np} with {instrument} playing the tune, {backing}, {bpm}",
    "{np} {key} at {tempo} speed, {beats}, with {instrument} in front",
)
_SPOKEN = (
    "The melody of this {tempo} {style} is played by {instrument} {key}", "This is {np} {lead}",
    "Music {key}: {np} with {instrument}", "{Instrument} plays {np} {key}", "{np}, {feel}, {lead}",
    "I would like {np} {key} {lead}",
    "Play {np} {lead} {bpm}", "Imagine {np} {key} with {instrument} singing out the tune",
    "{mood} {tempo} music {key} {lead}",
    "{Instrument} over {backers}: {np} {key}", "{np} {lead}; the mood is {mood} and the tempo {tempo}",
    "Instrumental: {style} {key}, {tempo}, {lead}", "{mood} {tempo} melody {key} {lead}",
)
_TERSE = (
    "{tempo} {style}, {solo}", "{solo} {style}, {plainkey}", "{tempo} {solo} music {key}", "{mood} {solo} melody",
    "{style} with {instrument}", "{plainkey} {style}, {beats}", "{solo}, {tempo}, {plainkey}", "{mood} {tempo} {style}",
    "{solo} {style} {key}", "{tempo} {solo} {style} {bpm}", "{mood} {tempo} {solo} music", "{tempo} {solo} tune {key}",
    "{mood} {solo} piece {key}", "{tempo} {mood} melody {lead}",
)


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    first = phrase.split()[0].lower()
    vowel = first[0] in "aeiou" and not first.startswith(("eu", "uk", "uni", "one"))
    vowel = vowel or first.startswith(("8-", "r&b"))
    return f"{'an' if vowel else 'a'} {phrase}"


def listed(items: list[str]) -> str:
    """Items as an English list."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _spell(rng: Random, tonic: str) -> str:
    """A tonic's name, sometimes with its accidental as a word."""
    if len(tonic) == 1:
        return tonic
    word = "sharp" if tonic[1] == "#" else "flat"
    return rng.choice((tonic, tonic, f"{tonic[0]} {word}", f"{tonic[0]}-{word}"))


def _key_phrases(rng: Random, truth: dict[str, Any]) -> tuple[str, str]:
    """The key as a phrase ("in a minor key") and as bare words ("D minor")."""
    mode, tonic = truth["mode"], _spell(rng, truth["key"])
    named = f"in {tonic} {mode}"
    if mode in ("major", "minor"):
        return rng.choice((named, named, named, f"in a {mode} key", f"in the key of {tonic} {mode}")), rng.choice(
            (f"{tonic} {mode}", f"{mode} key"))
    return rng.choice((named, named, named, f"in the {mode} mode", f"in {mode} mode on {tonic}")), rng.choice(
        (f"{tonic} {mode}", f"{mode} mode", mode))


def _backers(rng: Random, truth: dict[str, Any]) -> list[str]:
    """The accompanying instruments, in words."""
    others = [i for i in truth["instruments"] if i["role"] != "lead"]
    return [rng.choice(BACKING_WORDS.get(i["name"], (i["name"],))) for i in others]


def _slots(rng: Random, truth: dict[str, Any], template: str) -> dict[str, str]:
    """Words for the slots of one caption."""
    lead = truth["lead"]
    pool = INSTRUMENTS[lead["name"]]
    solo = rng.choice(FAMILY_WORDS[lead["family"]]) if rng.random() < 0.05 else rng.choice(pool)
    plural = solo.endswith("s") and not solo.endswith(("brass", "ss"))
    instrument = solo if plural else article(solo)
    key, plainkey = _key_phrases(rng, truth)
    tempo, mood = rng.choice(TEMPO[truth["tempo_class"]]), rng.choice((truth["mood"], *MOODS.get(truth["mood"], ())))
    style = rng.choice(STYLE_NOUNS[truth["style"]])
    beats = f"{truth['bpm']} {rng.choice(('bpm', 'bpm', 'BPM', 'beats per minute'))}"
    feel = rng.choice(DENSITY[truth["density"]])
    candidates = ((tempo, "{tempo}", 0.85), (mood, "{mood}", 0.6))
    adjectives = [word for word, slot, p in candidates if slot not in template and rng.random() < p]
    rng.shuffle(adjectives)
    if "{feel}" not in template and truth["density"] != "moderate" and rng.random() < 0.2:
        adjectives.insert(0, "sparse" if truth["density"] == "sparse" else rng.choice(("dense", "busy")))
    np = article(" ".join([", ".join(adjectives), style]).strip())
    backers = _backers(rng, truth)
    band = listed(backers)
    backing = rng.choice((f"accompanied by {band}", f"over {band}", f"backed by {band}", f"with {band}"))
    if not truth["drums"] and rng.random() < 0.3:
        backing = rng.choice((f"{backing} and no drums", f"{backing}, without drums"))
    return {
        "np": np, "key": key, "plainkey": plainkey, "solo": solo, "instrument": instrument, "tempo": tempo,
        "mood": mood,
        "style": style,
        "beats": beats, "bpm": rng.choice((f"at {beats}", f"at {beats}", f"at a tempo of {beats}")), "feel": feel,
        "metre": rng.choice(METRE_WORDS[truth["metre"]]), "backing": backing, "backers": band,
        "lead": rng.choice((f"played on {instrument}", f"on {instrument}", f"led by {instrument}",
                            f"with {instrument} in front", f"featuring {instrument}",
                            f"with {article(solo + ' melody')}")),
    }


def _write(rng: Random, truth: dict[str, Any], template: str) -> str:
    """One caption from a template."""
    slots = _slots(rng, truth, template)
    slots |= {name.capitalize(): slots[name][0].upper() + slots[name][1:] for name in ("np", "instrument")}
    text = template.format(**slots)
    return text[0].upper() + text[1:] + rng.choice((".", ".", "")) if rng.random() < 0.7 else text


def _course(rng: Random, truth: dict[str, Any]) -> list[str]:
    """Sentences on the course of the music, from the annotations."""
    def spoken_name(name: str) -> str:
        return rng.choice(BACKING_WORDS.get(name, (name,)))

    names = {section["name"] for section in truth.get("sections", ()) if section["end"] - section["start"] >= 1}
    opening = [spoken_name(name) for name in truth.get("opening", ())]
    counter = [spoken_name(part["name"]) for part in truth["instruments"] if part["role"] == "counter"]
    sentences = []
    if opening:
        starts = ("It opens with {} before the melody enters", "{} can be heard before the melody enters")
        sentences.append(rng.choice(starts).format(listed(opening)))
    if counter:
        starts = ("There is a counter-melody from the {}", "A second melody comes from the {}")
        sentences.append(rng.choice(starts).format(counter[0]))
    if {"verse", "chorus"} <= names:
        sentences.append(rng.choice(("The chorus is stronger than the verse", "A quieter verse and a strong chorus")))
    if "break" in names:
        sentences.append(rng.choice(("There is a short break", "The melody pauses for a short break")))
    if truth.get("ritardando") is not None:
        sentences.append(rng.choice(("It slows down at the end", "The tempo broadens at the end")))
    if truth.get("swing"):
        sentences.append(rng.choice(("The rhythm swings", "The eighth notes are swung")))
    return sentences


def _tags(rng: Random, truth: dict[str, Any]) -> str:
    """A comma-separated tag list."""
    tags = [truth["style"], rng.choice(INSTRUMENTS[truth["lead"]["name"]]), _key_phrases(rng, truth)[1],
            rng.choice(TEMPO[truth["tempo_class"]]), truth["mood"]]
    extra = [f"{truth['bpm']} bpm", truth["metre"], "drums" if truth["drums"] else "no drums", "instrumental"]
    tags += rng.sample(extra, rng.randint(1, 3))
    rng.shuffle(tags)
    return ", ".join(tags)


def tags(truth: dict[str, Any]) -> list[str]:
    """The ground truth as plain tags, the notes of the scale among them."""
    lead, key = truth["lead"], f"{truth['key']} {truth['mode']}"
    scale = [f"note {NOTE_NAMES[(pitch_class(truth['key']) + step) % 12]}" for step in MODES[truth["mode"]]]
    return [truth["style"], lead["name"], lead["family"], key, truth["mode"], truth["tempo_class"],
            f"{truth['bpm']} bpm", truth["metre"], truth["mood"], truth["density"],
            "drums" if truth["drums"] else "no drums", f"on {NOTE_NAMES[pitch_class(truth['key'])]}", *scale]


def write_captions(truth: dict[str, Any], rng_seed: int | str) -> list[str]:
    """Four to six captions of one segment: plain, detailed, spoken and terse ones, and a tag list.

    The same `rng_seed` gives the same captions.
    """
    rng = Random(f"caption {rng_seed}")
    templates = [rng.choice(_CORE), rng.choice(_DETAIL), rng.choice(_TERSE), rng.choice(_SPOKEN)]
    templates += [rng.choice(_CORE)] if rng.random() < 0.5 else []
    captions = [_write(rng, truth, template) for template in templates]
    course = _course(rng, truth)
    if course and rng.random() < 0.6:
        captions[1] = f"{captions[1].rstrip('.')}. {rng.choice(course)}."
    return list(dict.fromkeys([*captions, _tags(rng, truth)]))
