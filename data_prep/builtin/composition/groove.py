"""The definition of a style, and the pattern language of its grooves.

A pattern has one character per sixteenth for one bar: 16 in 4/4, 12 in 3/4 and 6/8. Spaces only group.

- chords: `C` the whole chord, `L` its lowest note, `U` the others, a digit one note of the arpeggio;
- bass: `1` root, `3` third, `5` fifth, `8` octave, `n` a step from the next root;
- both: `-` holds, `.` rests;
- drums: voices separated by `|`, each a letter (see `arrange.DRUM_KEYS`) and its hits, `x` strong and `o` soft.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Groove:
    """The patterns of one metre; a piece draws one of each kind. No `drums` means no drums in this metre."""

    chords: tuple[str, ...]
    bass: tuple[str, ...]
    drums: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Style:
    """A style: `tempo` in perceived beats per minute, grooves by metre, backing instruments by name, and probabilities.

    `drums`, `sevenths` and `pad` are the probabilities of drums, seventh chords and a pad; `kit` is the drum preset.
    """

    name: str
    tempo: tuple[int, int]
    moods: tuple[str, ...]
    backing: tuple[str, ...]
    basses: tuple[str, ...]
    grooves: dict[str, Groove]
    drums: float = 0.0
    kit: int = 0
    swing: bool = False
    sevenths: float = 0.0
    pad: float = 0.2


def events(pattern: str) -> list[tuple[int, int, str]]:
    """The events of a chord or bass pattern as (step, length in steps, character)."""
    found: list[tuple[int, int, str]] = []
    for step, cell in enumerate(pattern.replace(" ", "")):
        if cell == "-" and found:
            first, length, char = found[-1]
            found[-1] = (first, length + 1, char)
        elif cell not in "-.":
            found.append((step, 1, cell))
    return found
