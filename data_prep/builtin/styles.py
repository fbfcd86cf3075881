"""The styles as data: metres, tempi, players, and one-bar patterns for chords, bass and drums.

Patterns hold one character a sixteenth (16 in 4/4, 12 in 3/4 and 6/8); spaces only group. Chords: `C` the whole chord, `L` its
lowest note, `U` the upper notes, a digit one note of the arpeggio, `-` holds, `.` rests. Bass: `1` root, `3` third, `5` fifth,
`8` octave, `n` a step towards the next root. Drums: a voice's letter (see `arrange.DRUM_KEYS`), then `x` strong or `o` soft.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Groove:
    """The patterns of one metre; one of each tuple is drawn for a piece. No `drums` means that the style has none here."""

    chords: tuple[str, ...]
    bass: tuple[str, ...]
    drums: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Style:
    """A style: tempo range in felt beats a minute, grooves by metre, players, and chances between 0 and 1."""

    name: str
    tempo: tuple[int, int]
    grooves: dict[str, Groove]
    players: tuple[str, ...]
    basses: tuple[str, ...]
    drums: float = 0.0
    kit: int = 0
    swing: bool = False
    sevenths: float = 0.0
    pad: float = 0.2
    moods: tuple[str, ...] = field(default=())


STYLES: dict[str, Style] = {style.name: style for style in (
    Style("waltz", (60, 180), {"3/4": Groove(
        ("L--- U-.. U-..", "L--- U--. U--.", "L--- UU.. U-.."), ("1--- .... ....", "1--- ---- 5-.."),
        ("k x...........|h ....x...x...", "k x...........|s ....o...o..."))},
        ("piano", "accordion", "strings", "harp", "nylon-string guitar"), ("acoustic bass", "cello"), 0.4, moods=("elegant",)),
    Style("jazz swing", (75, 180), {"4/4": Groove(
        ("C--. ..C- .... ....", "..C- .... C--. ....", "C--. .... ..C- ...."), ("1--- 3--- 5--- n---", "1--- 5--- 3--- n---"),
        ("i x...x.x.x...x.x.|p ....x.......x...|k o.......o.......", "i x...x.x.x...x.x.|p ....x.......x...")),
        "3/4": Groove(("C--. ..C- ....", "C--- ---. C-.."), ("1--- 3--- 5---", "1--- 5--- n---"),
                      ("i x...x.x.x.x.|p ....x.......",), 0.5)},
        ("piano", "jazz guitar", "electric piano", "vibraphone", "organ"), ("acoustic bass",), 0.9, 32, True, 0.9, 0.0,
        ("cool", "smoky")),
    Style("bossa nova", (80, 160), {"4/4": Groove(
        ("C-.C -.C- .C-. C-..", "L-U- .LU- L-U- .U-."), ("1--- --5- 5--- --1-", "1--- --1- 5--- --5-"),
        ("m xoxoxoxoxoxoxoxo|r x.....x.....x...|k x.....xox.....xo", "h x.x.x.x.x.x.x.x.|r x..x..x...x..x..|k x.....x.x.....x."))},
        ("nylon-string guitar", "electric piano", "piano"), ("acoustic bass", "fretless bass"), 0.85, sevenths=0.9, pad=0.2,
        moods=("breezy", "sultry")),
    Style("rock", (90, 175), {"4/4": Groove(
        ("C-C-C-C-C-C-C-C-", "C--- C-C- C--- C-C-", "C--- ---- C--- C---"), ("1-1-1-1-1-1-1-1-", "1--- 1-1- 1--- 1-n-"),
        ("k x.....x.x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.", "k x.......x.x.....|s ....x.......x...|h x.o.x.o.x.o.x.o.")),
        "6/8": Groove(("C----- C-----", "C---C- C---C-"), ("1----- 1---1-", "1---1- 1---n-"),
                      ("k x.........x.|s ......x.....|h x.x.x.x.x.x.",), 0.4)},
        ("overdriven guitar", "clean electric guitar", "organ", "piano"), ("bass guitar",), 1.0, moods=("driving", "gritty")),
    Style("folk", (65, 150), {"4/4": Groove(
        ("L-U- U-U- L-U- U-U-", "0-2-1-2-0-2-1-2-", "L--- U--- L--- U---"), ("1--- .... 5--- ....", "1--- ---- 5--- ----")),
        "3/4": Groove(("L--- U-U- U-U-", "0-1-2-3-2-1-"), ("1--- ---- ....", "1--- ---- 5---")),
        "6/8": Groove(("L---U- L---U-", "0-1-2-3-2-1-"), ("1----- 5-----", "1----- 1-----"))},
        ("nylon-string guitar", "steel-string guitar", "accordion", "harp", "piano"), ("acoustic bass",), 0.0,
        moods=("homespun", "pastoral")),
    Style("techno", (118, 165), {"4/4": Groove(
        ("..C- ..C- ..C- ..C-", "0123012301230123", "C-.C -.C- .C-. C-C-"), ("..1-..1-..1-..1-", "1.1.1.1.1.1.8.1.", "1..1..1.1..1..8."),
        ("k x...x...x...x...|q ....x.......x...|o ..x...x...x...x.|h xoxoxoxoxoxoxoxo", "k x...x...x...x...|o ..x...x...x...x.|q ....x.......x..o"))},
        ("synth chords", "warm synth pad", "electric piano", "organ"), ("synth bass",), 1.0, 25, moods=("hypnotic", "pulsing")),
    Style("synth-pop", (92, 160), {"4/4": Groove(
        ("0-1-2-1-0-1-2-1-", "C--- ---- C--- C---", "..C-..C-..C-..C-"), ("1-1-1-1-1-1-1-1-", "1-8-1-8-1-8-1-8-"),
        ("k x...x...x...x...|q ....x.......x...|h ..x...x...x...x.", "k x.......x.......|q ....x.......x...|h x.x.x.x.x.x.x.x."))},
        ("synth chords", "warm synth pad", "piano", "clean electric guitar"), ("synth bass", "bass guitar"), 1.0, 24, pad=0.5,
        moods=("shiny", "neon")),
    Style("baroque", (60, 140), {"4/4": Groove(
        ("0-1-2-1-0-1-2-1-", "C--- C--- C--- C---", "012301230123 0123"), ("1--- 3--- 5--- n---", "1-8- 5-3- 1-8- 5-n-")),
        "3/4": Groove(("C--- C--- C---", "0-1-2-1-2-1-"), ("1--- 3--- 5---", "1-8- 5-3- 5-n-")),
        "6/8": Groove(("C---C- C---C-", "0-1-2-0-1-2-"), ("1---3- 5---n-", "1----- 5-----"), weight=0.5)},
        ("harpsichord", "church organ", "strings"), ("cello", "acoustic bass"), pad=0.1, moods=("ornate", "refined")),
    Style("classical", (58, 152), {"4/4": Groove(
        ("0-2-1-2-0-2-1-2-", "L--- U--- L--- U---", "0-1-2-3-2-1-2-1-"), ("1--- ---- ---- ----", "1--- ---- 5--- ----")),
        "3/4": Groove(("0-2-1-2-1-2-", "L--- U--- U---"), ("1--- ---- ----", "1--- ---- 5---")),
        "6/8": Groove(("0-2-1-0-2-1-", "L---U- L---U-"), ("1----- ------", "1----- 5-----"))},
        ("piano", "strings", "harp", "harpsichord"), ("cello", "acoustic bass"), pad=0.3, moods=("graceful", "refined")),
    Style("ballad", (54, 92), {"4/4": Groove(
        ("0-1-2-3-2-1-2-1-", "C--- C--- C--- C---", "0-2-3-2-0-2-3-2-"), ("1--- ---- 1--- --5-", "1--- ---- 5--- ----"),
        ("k x.......x.......|r ....x.......x...|h x.o.x.o.x.o.x.o.",)),
        "6/8": Groove(("0-1-2-3-2-1-", "C---C- C---C-"), ("1----- 5-----", "1---5- 1---n-"),
                      ("k x...........|r ......x.....|h x.o.o.x.o.o.",))},
        ("piano", "electric piano", "nylon-string guitar", "strings"), ("fretless bass", "bass guitar", "acoustic bass"), 0.55,
        sevenths=0.4, pad=0.5, moods=("heartfelt", "intimate")),
    Style("reggae", (66, 104), {"4/4": Groove(
        ("..C. ..C. ..C. ..C.", ".... C... .... C..."), ("1-.1 -.5- 1-.3 -.5-", "..1- 1--. 5--. 3-1-"),
        ("k ........x.......|r ........x.......|h x.x.x.x.x.x.x.x.", "k x...x...x...x...|r ....x.......x...|h x.xox.xox.xox.xo"))},
        ("clean electric guitar", "organ", "piano"), ("bass guitar",), 1.0, sevenths=0.2, pad=0.0, moods=("laid-back", "easy")),
    Style("march", (88, 138), {"4/4": Groove(
        ("L-U-L-U-L-U-L-U-", "C... C... C... C..."), ("1--. 5--. 1--. 5--.", "1-.. 1-.. 5-.. 5-.."),
        ("k x.......x.......|s x...x.xxx...x.xx", "k x...x...x...x...|s ..x...x...x.x.x.")),
        "6/8": Groove(("L---U- L---U-", "C---C- C---C-"), ("1---.. 5---..", "1----. 1---5-"),
                      ("k x.....x.....|s x...x.x...x.", "k x.....x.....|s ....x.....x."))},
        ("brass section", "strings", "piano", "organ"), ("tuba", "acoustic bass"), 1.0, pad=0.0, moods=("proud", "ceremonial")),
    Style("tango", (92, 142), {"4/4": Groove(
        ("C-.. C-.. C-.. C-.C", "C--C --C- C--- C---", "C-.. C-.. C-.. C-C-"), ("1--1 --5- 1--- 5---", "1-.. 5-.. 1-.. 5-n-"))},
        ("accordion", "piano", "strings", "nylon-string guitar"), ("acoustic bass", "cello"), pad=0.2, moods=("passionate",)),
    Style("ambient", (50, 88), {"4/4": Groove(
        ("C--- 3--- 2--- 3---", "0--- 1--- 2--- 1---", "0-1-2-3-2-1-2-1-"), ("1--- ---- ---- ----", "1--- ---- 5--- ----")),
        "3/4": Groove(("C--- 3--- 2---", "0--- 1--- 2---"), ("1--- ---- ----",)),
        "6/8": Groove(("0-1-2-3-2-1-", "C----- C-----"), ("1----- ------",), weight=0.6)},
        ("warm synth pad", "electric piano", "strings", "harp"), ("synth bass", "fretless bass"), 0.0, sevenths=0.5, pad=1.0,
        moods=("floating", "atmospheric")),
    Style("lullaby", (52, 90), {"3/4": Groove(("L--- U--- U---", "0-1-2-1-2-1-"), ("1--- ---- ----",)),
        "4/4": Groove(("0-1-2-1-0-1-2-1-", "L--- U--- L--- U---"), ("1--- ---- ---- ----", "1--- ---- 5--- ----")),
        "6/8": Groove(("0-1-2-3-2-1-", "L---U- L---U-"), ("1----- 5-----",))},
        ("piano", "harp", "nylon-string guitar", "strings", "vibraphone"), ("acoustic bass", "cello"), pad=0.3,
        moods=("soothing", "sleepy")),
    Style("jig", (96, 148), {"6/8": Groove(
        ("L---U- L---U-", "C-C-C- C-C-C-", "L---C- C---C-"), ("1----- 5-----", "1---1- 5---5-"),
        ("k x.....x.....|h x.o.x.x.o.x.", "t x...o.x...o.|h ....x.....x."))},
        ("steel-string guitar", "accordion", "piano", "harp"), ("acoustic bass",), 0.5, moods=("spirited", "rustic")),
    Style("polka", (112, 180), {"4/4": Groove(
        ("L-U-L-U-L-U-L-U-", "..C- ..C- ..C- ..C-"), ("1-.. 5-.. 1-.. 5-..", "1--- 5--- 1--- 3-n-"),
        ("k x...x...x...x...|s ..x...x...x...x.",))},
        ("accordion", "piano", "clean electric guitar", "brass section"), ("tuba", "acoustic bass"), 0.9, pad=0.0,
        moods=("bouncy", "spirited")),
    Style("country", (76, 176), {"4/4": Groove(
        ("..C- ..C- ..C- ..C-", "L-U- L-U- L-U- L-U-", "0-2-1-2-0-2-1-2-"), ("1--- ..5- 1--- 5---", "1--- 5--- 1--- 5---", "1--- 5--- 1--- 5-n-"),
        ("k x...x...x...x...|s ..x...x...x...x.", "k x.......x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.")),
        "3/4": Groove(("L--- U-U- U-U-", "L--- U--- U---"), ("1--- ---- 5---", "1--- .... ...."), ("k x...........|h ....x...x...",), 0.6)},
        ("steel-string guitar", "piano", "clean electric guitar"), ("acoustic bass", "bass guitar"), 0.75,
        moods=("down-home", "rustic")),
    Style("funk", (88, 128), {"4/4": Groove(
        ("..C. .C.. ..C. C...", "C..C ..C. .C.. C...", "..CC ..C. ..CC ..C."), ("1..1 ..1. 8..1 ..5.", "1-.. 1.8. ..1. 5.n."),
        ("k x..x..x...x..x..|s ....x..o.o..x..o|h xoxoxoxoxoxoxoxo", "k x.....x.x.x.....|s ....x.......x..o|h x.x.x.x.x.x.x.x."))},
        ("clean electric guitar", "electric piano", "organ", "brass section"), ("bass guitar",), 1.0, sevenths=0.7, pad=0.0,
        moods=("groovy", "punchy")),
    Style("blues", (60, 150), {"4/4": Groove(
        ("C--- ---. C--. ..C-", "C-C-C-C-C-C-C-C-", "..C- ..C- ..C- ..C-"), ("1--- 3--- 5--- 3---", "1--- 1--- 5--- n---"),
        ("k x.......x.......|s ....x.......x...|i x.x.x.x.x.x.x.x.", "k x.....x.x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.")),
        "6/8": Groove(("C-C-C- C-C-C-", "C----- C---C-"), ("1---1- 5---n-", "1----- 5-----"),
                      ("k x...........|s ......x.....|h x.x.x.x.x.x.",), 0.6)},
        ("piano", "electric piano", "organ", "clean electric guitar"), ("bass guitar", "acoustic bass"), 0.9, 0, True, 0.6, 0.0,
        ("soulful", "weary")),
    Style("salsa", (132, 178), {"4/4": Groove(
        ("C--C --C- .C-C --C-", "0-12 .02- 1.02 .12-", "..C- C-.C -.C- C-.."), ("1--- ..5- ---- 8---", "1-.. ..5- ..8- 5-.."),
        ("w x..x..x...x.x...|m xoxoxoxoxoxoxoxo|k x.......x.......", "w ..x.x...x..x..x.|b x...x...x...x.x.|g x...xx..x...xx.."))},
        ("piano", "brass section", "nylon-string guitar"), ("acoustic bass", "bass guitar"), 1.0, sevenths=0.4, pad=0.0,
        moods=("fiery", "sizzling")),
    Style("hymn", (54, 92), {"4/4": Groove(("C--- C--- C--- C---", "C--- ---- C--- ----"), ("1--- 3--- 5--- n---", "1--- ---- 5--- ----")),
        "3/4": Groove(("C--- C--- C---", "C--- ---- C---"), ("1--- ---- 5---", "1--- 3--- 5---"))},
        ("church organ", "strings", "piano"), ("cello", "acoustic bass"), pad=0.2, moods=("solemn", "reverent")),
    Style("cinematic", (62, 160), {"4/4": Groove(
        ("0-0-1-0-2-0-1-0-", "C--- C--- C--- C-C-", "C-C-C-C-C-C-C-C-"), ("1--- ---- 1--- ----", "1-1-1-1-1-1-1-1-"),
        ("t x..x..x.x..x..x.|k x.......x.......", "t x...x...x...x.x.|k x.......x.......")),
        "3/4": Groove(("0-1-2-0-1-2-", "C--- C-C- C-C-"), ("1--- ---- ----", "1--- 1--- 1---"), ("t x...x.x.x...|k x...........",)),
        "6/8": Groove(("0-1-2-0-1-2-", "C---C- C---C-"), ("1----- 1-----",), ("t x...x.x...x.|k x.....x.....",))},
        ("strings", "piano", "brass section", "warm synth pad"), ("cello", "synth bass", "acoustic bass"), 0.6, pad=0.6,
        moods=("epic", "sweeping")),
    Style("chiptune", (96, 180), {"4/4": Groove(
        ("0123012301230123", "0-1-2-1-0-1-2-1-", "..C-..C-..C-..C-"), ("1-8-1-8-1-8-1-8-", "1-1-8-1-1-1-8-5-"),
        ("k x...x...x...x...|q ....x.......x...|h ..x...x...x...x.",)),
        "3/4": Groove(("0-1-2-1-2-1-", "L-.. U-.. U-.."), ("1-8-1-8-1-8-",), ("k x...........|h ....x...x...",), 0.5)},
        ("synth chords", "clean electric guitar", "vibraphone"), ("synth bass",), 0.9, 25, pad=0.0,
        moods=("quirky", "bouncy")),
)}
