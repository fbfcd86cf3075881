"""Scales, keys and chords, in scale degrees counted from 0 (the tonic)."""

from dataclasses import dataclass

MODES: dict[str, tuple[int, ...]] = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
# The degree that distinguishes a mode from its nearest neighbour.
CHARACTERISTIC: dict[str, int] = {"major": 6, "minor": 5, "dorian": 5, "mixolydian": 6}
NOTE_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")  # one name per pitch class
_MAJOR_NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MINOR_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")
_LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


def is_bright(mode: str) -> bool:
    """Whether the mode has a major third."""
    return MODES[mode][2] == 4


def tonic_name(pitch_class: int, mode: str) -> str:
    """The usual spelling of a tonic, such as "Bb" or "F#"."""
    return (_MAJOR_NAMES if is_bright(mode) else _MINOR_NAMES)[pitch_class]


def pitch_class(name: str) -> int:
    """The pitch class (0 to 11) of a tonic's name."""
    return (_LETTERS[name[0]] + name.count("#") - name[1:].count("b")) % 12


@dataclass(frozen=True, slots=True)
class Key:
    """A tonic pitch class and a mode."""

    tonic: int
    mode: str

    def pitch(self, degree: int) -> int:
        """The MIDI key of a scale degree; degree 0 is the tonic in the octave of middle C (60 to 71)."""
        octave, step = divmod(degree, 7)
        return 60 + self.tonic + 12 * octave + MODES[self.mode][step]

    def degree_near(self, pitch: int) -> int:
        """The highest scale degree that does not lie above a MIDI key."""
        octave, rest = divmod(pitch - 60 - self.tonic, 12)
        return 7 * octave + max(i for i, step in enumerate(MODES[self.mode]) if step <= rest)


@dataclass(frozen=True, slots=True)
class Chord:
    """A chord of stacked thirds on a scale degree.

    `sevenths` adds the seventh; `leading` raises the third, which makes the minor key's dominant major.
    """

    root: int
    sevenths: bool = False
    leading: bool = False

    @property
    def degrees(self) -> tuple[int, ...]:
        """The chord's scale degrees, 0 to 6."""
        return tuple((self.root + step) % 7 for step in ((0, 2, 4, 6) if self.sevenths else (0, 2, 4)))

    def pitch_classes(self, key: Key) -> tuple[int, ...]:
        """The chord's pitch classes, root first."""
        classes = [key.pitch(degree) % 12 for degree in self.degrees]
        if self.leading:
            classes[1] = (classes[1] + 1) % 12
        return tuple(classes)
