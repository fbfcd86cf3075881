"""What a style is, and the pattern language its grooves are written in.

A pattern holds one character a sixteenth for one bar: 16 in 4/4, 12 in 3/4 and 6/8. Spaces only group.

- chords: `C` the whole chord, `L` its lowest note, `U` the others, a digit one note of the arpeggio;
- bass: `1` root, `3` third, `5` fifth, `8` octave, `n` a step from the next root;
- both: `-` holds, `.` rests;
- drums: voices parted by `|`, each a letter (see `arrange.DRUM_KEYS`) and its hits, `x` strong and `o` soft.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Groove:
    """The patterns of one metre, of which a piece draws one each; no `drums` means that the style has none here."""

    chords: tuple[str, ...]
    bass: tuple[str, ...]
    drums: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Style:
    """A style: `tempo` in felt beats a minute, grooves by metre, players by name, and chances between 0 and 1.

    `drums`, `sevenths` and `pad` are the chances of drums, of seventh chords and of a pad; `kit` is the drum preset.
    """

    name: str
    tempo: tuple[int, int]
    moods: tuple[str, ...]
    players: tuple[str, ...]
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
