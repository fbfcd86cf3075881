"""The styles as data; `definition` explains the pattern language."""

from data_prep.builtin.composition.styles.definition import Groove, Style

_STYLES = (
    Style(
        "waltz", tempo=(60, 180), drums=0.4, moods=("elegant",),
        backing=("piano", "accordion", "strings", "harp", "nylon-string guitar"),
        basses=("acoustic bass", "cello"),
        grooves={
            "3/4": Groove(
                chords=("L--- U-.. U-..", "L--- U--. U--.", "L--- UU.. U-.."),
                bass=("1--- .... ....", "1--- ---- 5-.."),
                drums=("k x...........|h ....x...x...", "k x...........|s ....o...o..."),
            ),
        },
    ),
    Style(
        "jazz swing", tempo=(75, 180), drums=0.9, sevenths=0.9, pad=0.0, moods=("cool", "smoky"),
        backing=("piano", "jazz guitar", "electric piano", "vibraphone", "organ"),
        basses=("acoustic bass",),
        grooves={
            "4/4": Groove(
                chords=("C--. ..C- .... ....", "..C- .... C--. ....", "C--. .... ..C- ...."),
                bass=("1--- 3--- 5--- n---", "1--- 5--- 3--- n---"),
                drums=(
                    "i x...x.x.x...x.x.|p ....x.......x...|k o.......o.......",
                    "i x...x.x.x...x.x.|p ....x.......x...",
                ),
            ),
            "3/4": Groove(
                weight=0.5,
                chords=("C--. ..C- ....", "C--- ---. C-.."),
                bass=("1--- 3--- 5---", "1--- 5--- n---"),
                drums=("i x...x.x.x.x.|p ....x.......",),
            ),
        },
    ),
    Style(
        "bossa nova", tempo=(80, 160), drums=0.85, sevenths=0.9, moods=("breezy", "sultry"),
        backing=("nylon-string guitar", "electric piano", "piano"),
        basses=("acoustic bass", "fretless bass"),
        grooves={
            "4/4": Groove(
                chords=("C-.C -.C- .C-. C-..", "L-U- .LU- L-U- .U-."),
                bass=("1--- --5- 5--- --1-", "1--- --1- 5--- --5-"),
                drums=(
                    "m xoxoxoxoxoxoxoxo|r x.....x.....x...|k x.....xox.....xo",
                    "h x.x.x.x.x.x.x.x.|r x..x..x...x..x..|k x.....x.x.....x.",
                ),
            ),
        },
    ),
    Style(
        "rock", tempo=(90, 175), drums=1.0, moods=("driving", "gritty"),
        backing=("overdriven guitar", "clean electric guitar", "organ", "piano"),
        basses=("bass guitar",),
        grooves={
            "4/4": Groove(
                chords=("C-C-C-C-C-C-C-C-", "C--- C-C- C--- C-C-", "C--- ---- C--- C---"),
                bass=("1-1-1-1-1-1-1-1-", "1--- 1-1- 1--- 1-n-"),
                drums=(
                    "k x.....x.x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.",
                    "k x.......x.x.....|s ....x.......x...|h x.o.x.o.x.o.x.o.",
                ),
            ),
            "6/8": Groove(
                weight=0.4,
                chords=("C----- C-----", "C---C- C---C-"),
                bass=("1----- 1---1-", "1---1- 1---n-"),
                drums=("k x.........x.|s ......x.....|h x.x.x.x.x.x.",),
            ),
        },
    ),
    Style(
        "folk", tempo=(65, 150), moods=("homespun", "pastoral"),
        backing=("nylon-string guitar", "steel-string guitar", "accordion", "harp", "piano"),
        basses=("acoustic bass",),
        grooves={
            "4/4": Groove(
                chords=("L-U- U-U- L-U- U-U-", "0-2-1-2-0-2-1-2-", "L--- U--- L--- U---"),
                bass=("1--- .... 5--- ....", "1--- ---- 5--- ----"),
            ),
            "3/4": Groove(
                chords=("L--- U-U- U-U-", "0-1-2-3-2-1-"),
                bass=("1--- ---- ....", "1--- ---- 5---"),
            ),
            "6/8": Groove(
                chords=("L---U- L---U-", "0-1-2-3-2-1-"),
                bass=("1----- 5-----", "1----- 1-----"),
            ),
        },
    ),
    Style(
        "techno", tempo=(118, 165), drums=1.0, moods=("hypnotic", "pulsing"),
        backing=("synth chords", "warm synth pad", "electric piano", "organ"),
        basses=("synth bass",),
        grooves={
            "4/4": Groove(
                chords=("..C- ..C- ..C- ..C-", "0123012301230123", "C-.C -.C- .C-. C-C-"),
                bass=("..1-..1-..1-..1-", "1.1.1.1.1.1.8.1.", "1..1..1.1..1..8."),
                drums=(
                    "k x...x...x...x...|q ....x.......x...|o ..x...x...x...x.|h xoxoxoxoxoxoxoxo",
                    "k x...x...x...x...|o ..x...x...x...x.|q ....x.......x..o",
                ),
            ),
        },
    ),
    Style(
        "synth-pop", tempo=(92, 160), drums=1.0, pad=0.5, moods=("shiny", "neon"),
        backing=("synth chords", "warm synth pad", "piano", "clean electric guitar"),
        basses=("synth bass", "bass guitar"),
        grooves={
            "4/4": Groove(
                chords=("0-1-2-1-0-1-2-1-", "C--- ---- C--- C---", "..C-..C-..C-..C-"),
                bass=("1-1-1-1-1-1-1-1-", "1-8-1-8-1-8-1-8-"),
                drums=(
                    "k x...x...x...x...|q ....x.......x...|h ..x...x...x...x.",
                    "k x.......x.......|q ....x.......x...|h x.x.x.x.x.x.x.x.",
                ),
            ),
        },
    ),
    Style(
        "baroque", tempo=(60, 140), pad=0.1, moods=("ornate", "refined"),
        backing=("harpsichord", "church organ", "strings"),
        basses=("cello", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("0-1-2-1-0-1-2-1-", "C--- C--- C--- C---", "012301230123 0123"),
                bass=("1--- 3--- 5--- n---", "1-8- 5-3- 1-8- 5-n-"),
            ),
            "3/4": Groove(
                chords=("C--- C--- C---", "0-1-2-1-2-1-"),
                bass=("1--- 3--- 5---", "1-8- 5-3- 5-n-"),
            ),
            "6/8": Groove(
                weight=0.5,
                chords=("C---C- C---C-", "0-1-2-0-1-2-"),
                bass=("1---3- 5---n-", "1----- 5-----"),
            ),
        },
    ),
    Style(
        "classical", tempo=(58, 152), pad=0.3, moods=("graceful", "refined"),
        backing=("piano", "strings", "harp", "harpsichord"),
        basses=("cello", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("0-2-1-2-0-2-1-2-", "L--- U--- L--- U---", "0-1-2-3-2-1-2-1-"),
                bass=("1--- ---- ---- ----", "1--- ---- 5--- ----"),
            ),
            "3/4": Groove(
                chords=("0-2-1-2-1-2-", "L--- U--- U---"),
                bass=("1--- ---- ----", "1--- ---- 5---"),
            ),
            "6/8": Groove(
                chords=("0-2-1-0-2-1-", "L---U- L---U-"),
                bass=("1----- ------", "1----- 5-----"),
            ),
        },
    ),
    Style(
        "ballad", tempo=(54, 92), drums=0.55, sevenths=0.4, pad=0.5, moods=("heartfelt", "intimate"),
        backing=("piano", "electric piano", "nylon-string guitar", "strings"),
        basses=("fretless bass", "bass guitar", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("0-1-2-3-2-1-2-1-", "C--- C--- C--- C---", "0-2-3-2-0-2-3-2-"),
                bass=("1--- ---- 1--- --5-", "1--- ---- 5--- ----"),
                drums=("k x.......x.......|r ....x.......x...|h x.o.x.o.x.o.x.o.",),
            ),
            "6/8": Groove(
                chords=("0-1-2-3-2-1-", "C---C- C---C-"),
                bass=("1----- 5-----", "1---5- 1---n-"),
                drums=("k x...........|r ......x.....|h x.o.o.x.o.o.",),
            ),
        },
    ),
    Style(
        "reggae", tempo=(66, 104), drums=1.0, sevenths=0.2, pad=0.0, moods=("laid-back", "easy"),
        backing=("clean electric guitar", "organ", "piano"),
        basses=("bass guitar",),
        grooves={
            "4/4": Groove(
                chords=("..C. ..C. ..C. ..C.", ".... C... .... C..."),
                bass=("1-.1 -.5- 1-.3 -.5-", "..1- 1--. 5--. 3-1-"),
                drums=(
                    "k ........x.......|r ........x.......|h x.x.x.x.x.x.x.x.",
                    "k x...x...x...x...|r ....x.......x...|h x.xox.xox.xox.xo",
                ),
            ),
        },
    ),
    Style(
        "march", tempo=(88, 138), drums=1.0, pad=0.0, moods=("proud", "ceremonial"),
        backing=("brass section", "strings", "piano", "organ"),
        basses=("tuba", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("L-U-L-U-L-U-L-U-", "C... C... C... C..."),
                bass=("1--. 5--. 1--. 5--.", "1-.. 1-.. 5-.. 5-.."),
                drums=("k x.......x.......|s x...x.xxx...x.xx", "k x...x...x...x...|s ..x...x...x.x.x."),
            ),
            "6/8": Groove(
                chords=("L---U- L---U-", "C---C- C---C-"),
                bass=("1---.. 5---..", "1----. 1---5-"),
                drums=("k x.....x.....|s x...x.x...x.", "k x.....x.....|s ....x.....x."),
            ),
        },
    ),
    Style(
        "tango", tempo=(92, 142), moods=("passionate",),
        backing=("accordion", "piano", "strings", "nylon-string guitar"),
        basses=("acoustic bass", "cello"),
        grooves={
            "4/4": Groove(
                chords=("C-.. C-.. C-.. C-.C", "C--C --C- C--- C---", "C-.. C-.. C-.. C-C-"),
                bass=("1--1 --5- 1--- 5---", "1-.. 5-.. 1-.. 5-n-"),
            ),
        },
    ),
    Style(
        "ambient", tempo=(50, 88), sevenths=0.5, pad=1.0, moods=("floating", "atmospheric"),
        backing=("warm synth pad", "electric piano", "strings", "harp"),
        basses=("synth bass", "fretless bass"),
        grooves={
            "4/4": Groove(
                chords=("C--- 3--- 2--- 3---", "0--- 1--- 2--- 1---", "0-1-2-3-2-1-2-1-"),
                bass=("1--- ---- ---- ----", "1--- ---- 5--- ----"),
            ),
            "3/4": Groove(
                chords=("C--- 3--- 2---", "0--- 1--- 2---"),
                bass=("1--- ---- ----",),
            ),
            "6/8": Groove(
                weight=0.6,
                chords=("0-1-2-3-2-1-", "C----- C-----"),
                bass=("1----- ------",),
            ),
        },
    ),
    Style(
        "lullaby", tempo=(52, 90), pad=0.3, moods=("soothing", "sleepy"),
        backing=("piano", "harp", "nylon-string guitar", "strings", "vibraphone"),
        basses=("acoustic bass", "cello"),
        grooves={
            "3/4": Groove(
                chords=("L--- U--- U---", "0-1-2-1-2-1-"),
                bass=("1--- ---- ----",),
            ),
            "4/4": Groove(
                chords=("0-1-2-1-0-1-2-1-", "L--- U--- L--- U---"),
                bass=("1--- ---- ---- ----", "1--- ---- 5--- ----"),
            ),
            "6/8": Groove(
                chords=("0-1-2-3-2-1-", "L---U- L---U-"),
                bass=("1----- 5-----",),
            ),
        },
    ),
    Style(
        "jig", tempo=(96, 148), drums=0.5, moods=("spirited", "rustic"),
        backing=("steel-string guitar", "accordion", "piano", "harp"),
        basses=("acoustic bass",),
        grooves={
            "6/8": Groove(
                chords=("L---U- L---U-", "C-C-C- C-C-C-", "L---C- C---C-"),
                bass=("1----- 5-----", "1---1- 5---5-"),
                drums=("k x.....x.....|h x.o.x.x.o.x.", "t x...o.x...o.|h ....x.....x."),
            ),
        },
    ),
    Style(
        "polka", tempo=(112, 180), drums=0.9, pad=0.0, moods=("bouncy", "spirited"),
        backing=("accordion", "piano", "clean electric guitar", "brass section"),
        basses=("tuba", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("L-U-L-U-L-U-L-U-", "..C- ..C- ..C- ..C-"),
                bass=("1-.. 5-.. 1-.. 5-..", "1--- 5--- 1--- 3-n-"),
                drums=("k x...x...x...x...|s ..x...x...x...x.",),
            ),
        },
    ),
    Style(
        "country", tempo=(76, 176), drums=0.75, moods=("down-home", "rustic"),
        backing=("steel-string guitar", "piano", "clean electric guitar"),
        basses=("acoustic bass", "bass guitar"),
        grooves={
            "4/4": Groove(
                chords=("..C- ..C- ..C- ..C-", "L-U- L-U- L-U- L-U-", "0-2-1-2-0-2-1-2-"),
                bass=("1--- ..5- 1--- 5---", "1--- 5--- 1--- 5---", "1--- 5--- 1--- 5-n-"),
                drums=(
                    "k x...x...x...x...|s ..x...x...x...x.",
                    "k x.......x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.",
                ),
            ),
            "3/4": Groove(
                weight=0.6,
                chords=("L--- U-U- U-U-", "L--- U--- U---"),
                bass=("1--- ---- 5---", "1--- .... ...."),
                drums=("k x...........|h ....x...x...",),
            ),
        },
    ),
    Style(
        "funk", tempo=(88, 128), drums=1.0, sevenths=0.7, pad=0.0, moods=("groovy", "punchy"),
        backing=("clean electric guitar", "electric piano", "organ", "brass section"),
        basses=("bass guitar",),
        grooves={
            "4/4": Groove(
                chords=("..C. .C.. ..C. C...", "C..C ..C. .C.. C...", "..CC ..C. ..CC ..C."),
                bass=("1..1 ..1. 8..1 ..5.", "1-.. 1.8. ..1. 5.n."),
                drums=(
                    "k x..x..x...x..x..|s ....x..o.o..x..o|h xoxoxoxoxoxoxoxo",
                    "k x.....x.x.x.....|s ....x.......x..o|h x.x.x.x.x.x.x.x.",
                ),
            ),
        },
    ),
    Style(
        "blues", tempo=(60, 150), drums=0.9, sevenths=0.6, pad=0.0, moods=("soulful", "weary"),
        backing=("piano", "electric piano", "organ", "clean electric guitar"),
        basses=("bass guitar", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("C--- ---. C--. ..C-", "C-C-C-C-C-C-C-C-", "..C- ..C- ..C- ..C-"),
                bass=("1--- 3--- 5--- 3---", "1--- 1--- 5--- n---"),
                drums=(
                    "k x.......x.......|s ....x.......x...|i x.x.x.x.x.x.x.x.",
                    "k x.....x.x.......|s ....x.......x...|h x.x.x.x.x.x.x.x.",
                ),
            ),
            "6/8": Groove(
                weight=0.6,
                chords=("C-C-C- C-C-C-", "C----- C---C-"),
                bass=("1---1- 5---n-", "1----- 5-----"),
                drums=("k x...........|s ......x.....|h x.x.x.x.x.x.",),
            ),
        },
    ),
    Style(
        "salsa", tempo=(132, 178), drums=1.0, sevenths=0.4, pad=0.0, moods=("fiery", "sizzling"),
        backing=("piano", "brass section", "nylon-string guitar"),
        basses=("acoustic bass", "bass guitar"),
        grooves={
            "4/4": Groove(
                chords=("C--C --C- .C-C --C-", "0-12 .02- 1.02 .12-", "..C- C-.C -.C- C-.."),
                bass=("1--- ..5- ---- 8---", "1-.. ..5- ..8- 5-.."),
                drums=(
                    "w x..x..x...x.x...|m xoxoxoxoxoxoxoxo|k x.......x.......",
                    "w ..x.x...x..x..x.|b x...x...x...x.x.|g x...xx..x...xx..",
                ),
            ),
        },
    ),
    Style(
        "hymn", tempo=(54, 92), moods=("solemn", "reverent"),
        backing=("church organ", "strings", "piano"),
        basses=("cello", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("C--- C--- C--- C---", "C--- ---- C--- ----"),
                bass=("1--- 3--- 5--- n---", "1--- ---- 5--- ----"),
            ),
            "3/4": Groove(
                chords=("C--- C--- C---", "C--- ---- C---"),
                bass=("1--- ---- 5---", "1--- 3--- 5---"),
            ),
        },
    ),
    Style(
        "cinematic", tempo=(62, 160), drums=0.6, pad=0.6, moods=("epic", "sweeping"),
        backing=("strings", "piano", "brass section", "warm synth pad"),
        basses=("cello", "synth bass", "acoustic bass"),
        grooves={
            "4/4": Groove(
                chords=("0-0-1-0-2-0-1-0-", "C--- C--- C--- C-C-", "C-C-C-C-C-C-C-C-"),
                bass=("1--- ---- 1--- ----", "1-1-1-1-1-1-1-1-"),
                drums=("t x..x..x.x..x..x.|k x.......x.......", "t x...x...x...x.x.|k x.......x......."),
            ),
            "3/4": Groove(
                chords=("0-1-2-0-1-2-", "C--- C-C- C-C-"),
                bass=("1--- ---- ----", "1--- 1--- 1---"),
                drums=("t x...x.x.x...|k x...........",),
            ),
            "6/8": Groove(
                chords=("0-1-2-0-1-2-", "C---C- C---C-"),
                bass=("1----- 1-----",),
                drums=("t x...x.x...x.|k x.....x.....",),
            ),
        },
    ),
    Style(
        "chiptune", tempo=(96, 180), drums=0.9, pad=0.0, moods=("quirky", "bouncy"),
        backing=("synth chords", "clean electric guitar", "vibraphone"),
        basses=("synth bass",),
        grooves={
            "4/4": Groove(
                chords=("0123012301230123", "0-1-2-1-0-1-2-1-", "..C-..C-..C-..C-"),
                bass=("1-8-1-8-1-8-1-8-", "1-1-8-1-1-1-8-5-"),
                drums=("k x...x...x...x...|q ....x.......x...|h ..x...x...x...x.",),
            ),
            "3/4": Groove(
                weight=0.5,
                chords=("0-1-2-1-2-1-", "L-.. U-.. U-.."),
                bass=("1-8-1-8-1-8-",),
                drums=("k x...........|h ....x...x...",),
            ),
        },
    ),
)
STYLES: dict[str, Style] = {style.name: style for style in _STYLES}
