"""Keys and metres, as people write them and as class numbers. This module imports no torch."""

import re

from ssmttm.errors import UserError

_MAJOR_NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MINOR_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")
# The key of class k: pitch class k % 12, major up to 11, then minor.
KEYS = (*(f"{name} major" for name in _MAJOR_NAMES), *(f"{name} minor" for name in _MINOR_NAMES))
# Beats of a bar by metre, in the order of the classes. The beat is the one that a tempo counts: a dotted quarter in
# 6/8, 9/8 and 12/8, an eighth in 7/8.
METRES = {"2/4": 2, "3/4": 3, "4/4": 4, "5/4": 5, "6/8": 2, "7/8": 7, "9/8": 3, "12/8": 4}
MAX_BPM = 1000.0

_LETTERS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_MODES = {  # whether the third is minor
    "major": False, "maj": False, "ionian": False, "lydian": False, "mixolydian": False,
    "minor": True, "min": True, "m": True, "aeolian": True, "dorian": True, "phrygian": True, "locrian": True,
}  # fmt: skip
_KEY = re.compile(r"([a-g])[\s_-]*(#|\u266f|sharp|b|\u266d|flat)?[\s_-]*(natural|harmonic|melodic)?[\s_-]*([a-z]+)")


def parse_key(text: str) -> int:
    """The class, 0 to 23, of a key such as "D minor", "Bbm" or "F# dorian" (a mode counts by its third).

    Raises UserError if it is no tonic with a mode.
    """
    found = _KEY.fullmatch(text.strip().casefold())
    if found is None or found[4] not in _MODES:
        raise UserError(f"{text!r} is no key: write a tonic and a mode, such as 'D minor' or 'F# major'")
    shift = {"#": 1, "\u266f": 1, "sharp": 1, "b": -1, "\u266d": -1, "flat": -1}.get(found[2], 0)
    return (_LETTERS[found[1]] + shift) % 12 + 12 * _MODES[found[4]]


def parse_metre(text: str) -> int:
    """The class of a metre such as "3/4". Raises UserError if it is none of METRES."""
    plain = re.sub(r"\s", "", text)
    if plain not in METRES:
        raise UserError(f"{text!r} is no known metre: choose from {', '.join(METRES)}")
    return list(METRES).index(plain)


def beats_of(metre: int) -> int:
    """Beats of a bar by the class of the metre."""
    return list(METRES.values())[metre]


def check_bpm(bpm: float | None) -> None:
    """Raises UserError if a given tempo is not above 0 and at most MAX_BPM beats per minute."""
    if bpm is not None and not 0 < bpm <= MAX_BPM:
        raise UserError(f"bpm must be above 0 and at most {MAX_BPM:g} beats per minute, got {bpm}")
