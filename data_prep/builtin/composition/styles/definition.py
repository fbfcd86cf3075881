"""The definition of a style, and the pattern language of its grooves.

A pattern has one character per sixteenth for one bar: 16 in 4/4, 12 in 3/4 and 6/8. Spaces only group.

- chords: `C` the whole chord, `L` its lowest note, `U` the others, a digit one note of the arpeggio;
- bass: `1` root, `3` third, `5` fifth, `8` octave, `n` a step from the next root;
- both: `-` holds, `.` rests;
- drums: voices separated by `|`, each a letter (see `parts.drums.KEYS`) and its hits, `x` strong and `o` soft.
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

    `drums`, `sevenths` and `pad` are the probabilities of drums, seventh chords and a pad.
    """

    name: str
    tempo: tuple[int, int]
    moods: tuple[str, ...]
    backing: tuple[str, ...]
    basses: tuple[str, ...]
    grooves: dict[str, Groove]
    drums: float = 0.0
    sevenths: float = 0.0
    pad: float = 0.2


@dataclass(frozen=True, slots=True)
class Manner:
    """How a style is played.

    Attributes:
        kits: General MIDI drum kits.
        swing, shuffle: delay of the off-beat eighths and sixteenths, 1 for triplets.
        looseness: of timing and dynamics; 0 for machines.
        room, wet: the reverb's room and its level in dB.
        voicing: of chords: close, spread, or shell (without the root where there is a seventh).
        approach, chromatic, inversions: how often the bass leads into a chord, by a semitone, or takes its third.
        vamp: how often a phrase turns on two chords.
        build: how the parts enter over time: song, layers or tune (see `arrangement`).
        colours: instruments of a second accompaniment, entering later. counter: probability of a counter-melody.
        ritardando: probability of a slower end. stab: whether a quick piece may end on a short chord.
    """

    kits: tuple[int, ...] = (0,)
    swing: float = 0.0
    shuffle: float = 0.0
    looseness: float = 1.0
    room: str = "studio"
    wet: float = -14.0
    voicing: str = "close"
    approach: float = 0.25
    chromatic: bool = False
    inversions: float = 0.0
    vamp: float = 0.45
    build: str = "tune"
    colours: tuple[str, ...] = ()
    counter: float = 0.25
    ritardando: float = 0.0
    stab: bool = False
