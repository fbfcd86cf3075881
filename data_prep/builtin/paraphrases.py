"""Prompts as people write them, reserved for evaluation: no training caption is made from these templates.

Training code must not import this module (a test checks that). It states the same true attributes as the captions.
"""

from random import Random
from typing import Any

from data_prep.builtin.captions import article, listed

COUNT = 4  # prompts of one segment

# Slots: style, solo (the lead), lead (with article), mood, key ("D minor"), mode, bpm, metre, quick (an adjective of
# tempo), pace (a phrase of tempo), band (the other instruments).
TEMPLATES: tuple[str, ...] = (
    "ok so picture {style} where {lead} does all the talking, {pace}, tuned to {key}",
    "need something {mood} to put under a video: {quick} {style}, {solo} up top, {key}",
    "can you make me {style}? think {mood}, {pace}, {solo} doing the singing part, {band} behind",
    "{lead} telling a {mood} story while {band} keep it moving; {key}, {metre}, {bpm} a minute",
    "background for a scene: {pace}, {mood}, mostly {solo}",
    "what would {quick} {style} sound like if {lead} had the main theme, say around {key}?",
    "give us {style}, {bpm} clicks a minute, {solo} as star of the show",
    "my grandmother used to hum {style} like this: {mood}, {pace}, {lead} taking her part",
    "looking for: {solo}. vibe: {mood}. speed: {quick}. scale: {key}.",
    "{mood}? yes. {solo}? yes. {pace}? yes. that sort of {style} please",
    "a little {style} number, somebody on {solo} noodling away around {key}, {pace}",
    "Let {lead} loose above {band}; keep things {mood}, {key} throughout",
    "we open the curtain, {lead} steps forward and the room turns {mood}. {style}, {pace}",
    "{solo} + {band}, {key}, metronome reads {bpm}",
    "Compose {quick} {style} whose tune belongs to {lead}; {mode} flavour",
    "I'm after that {mood} {mode} sound, {solo} soloing, count it {metre}",
    "like something off a record: {lead} doing {style}, {pace}, everything {mood}",
    "write {style} for my {solo} teacher, home note and scale {key}, {pace}",
    "wordless {style}; {solo} handles whatever a singer would have sung; {mood} and {pace}",
    "Generate audio: genre={style}; soloist={solo}; tonality={key}; tempo={bpm}; feeling={mood}",
    "somebody walks into a bar and hears {lead}. It's {style}, it's {mood}, it's {pace}",
    "a bit of {style} please, {solo} centre stage, {band} filling out what's underneath",
    "Short clip wanted, {mood} in character, {solo} heard above everything else, {key}",
    "the band ({band}) lays down {quick} {style} so that {lead} can shine, {mode} tonality",
    "{pace}, that's how I want it. {style}. and {lead}, always {lead}.",
    "Think of rain on a window if it were {mood}: {lead}, {pace}, {key}",
    "soundtrack idea -> {mood} + {solo} + {style} @ {bpm} bpm",
    "Could the {solo} please get the hook here? {style}, {quick}, scale of {key}",
    "every bar counted {metre}, every phrase {mood}, {lead} on tune duty",
    "Something to study to? no, something {mood}: {style} where {lead} stays the boss",
    "nothing fancy, just {lead} doing what it does best within {style}, {pace}",
    "{key}. {bpm}. {solo}. {style}. go.",
    "Whoever wrote this must have felt {mood}; listen how {lead} wanders through {key}, {pace}",
    "bring {band} together beneath {lead}, aim for {mood}, settle on {mode}",
    "for our game's next level: {quick} music, {style} type, {solo} theme, {mode}-sounding",
    "If {style} could be {mood} and {pace}, with all eyes on {lead}, this would be it",
    "take {style}, hand its melody over to {lead}, leave it {mood}",
    "Podcast jingle: {solo} up front and centre, {pace}, {mood} not cheesy",
    "the {solo} should sound {mood}. around it: {band}. underneath it all, {metre} pulse, {quick}",
    "It starts and you instantly notice {lead}; you'd call it {style}, {pace}, rooted at {key}",
    "dance floor or living room, I don't mind, so long as it's {quick}, {mode} and has {lead}",
    "Reference: {style} recordings. Main voice: {solo}. Pulse: {bpm} per minute. Colour: {mode}.",
    "{lead}, {mood} as can be, wandering over {metre} bars of {style}",
    "please no vocals at all! {solo} instead, {mood}, {pace}",
)

_QUICK = {"slow": ("slow", "languid", "sleepy-paced"), "medium": ("medium-speed", "middling-tempo", "middle-speed"),
          "fast": ("speedy", "high-speed", "fast-moving")}
_PACE = {"slow": ("taking its time", "in no hurry at all", "really slow going", "slow as a Sunday"),
         "medium": ("neither fast nor slow", "at a comfortable walking pace", "ticking along at medium speed"),
         "fast": ("racing along", "going at full tilt", "quick on its feet", "fast as it can go")}
_METRE = {"4/4": ("four to the bar", "4/4"), "3/4": ("one-two-three", "3/4"), "6/8": ("two lots of three", "6/8")}


def _slots(rng: Random, truth: dict[str, Any]) -> dict[str, str]:
    """Words for the slots."""
    others = [part["name"] for part in truth["instruments"] if part["role"] != "lead"]
    solo, tempo = truth["lead"]["name"], truth["tempo_class"]
    return {
        "style": truth["style"], "solo": solo, "lead": article(solo), "mood": truth["mood"], "mode": truth["mode"],
        "key": f"{truth['key']} {truth['mode']}", "bpm": str(truth["bpm"]), "quick": rng.choice(_QUICK[tempo]),
        "pace": rng.choice(_PACE[tempo]), "metre": rng.choice(_METRE[truth["metre"]]),
        "band": listed(others) if others else "nobody else",
    }


def write_paraphrases(truth: dict[str, Any], rng_seed: int | str) -> list[str]:
    """Four prompts of one segment, each from another template. The same `rng_seed` gives the same prompts."""
    rng = Random(f"paraphrase {rng_seed}")
    return [template.format(**_slots(rng, truth)) for template in rng.sample(TEMPLATES, COUNT)]
