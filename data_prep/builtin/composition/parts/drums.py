"""Drums: light and full patterns, ghost notes, variations every fourth bar, fills into sections and cymbals on them."""

from random import Random

from data_prep.builtin.composition.arrangement import Bar
from data_prep.builtin.composition.score import TICKS, Metre, Note
from data_prep.builtin.composition.styles.manners import ORCHESTRA

KEYS = {"k": 36, "s": 38, "r": 37, "p": 44, "h": 42, "o": 46, "i": 51, "c": 49, "q": 39, "t": 45, "m": 70, "w": 76,
        "b": 56, "g": 63}
_VELOCITY = {"x": 100, "o": 62}
_SOFTER = {"s": "r", "o": "h"}  # what plays instead in a light bar
# Fills by sixteenths (thirds of a beat in compound metres): S snare, H M L F toms from high to low, K kick.
_FILLS = {False: ("SSSS", "S.SSHHLL", "S.S.SSHM", "HHMMLLFF", "SSHHMMLLFFFF", "K.S.SHML", "SSSSHHHHMMMMLLFF"),
          True: ("SSS", "SHL", "S.SHML", "HHMMLL", "SSSHML")}
_ROLLS = {False: ("SSSS", "S.S.SSSS", "SSSSSSSS"), True: ("SSS", "S.SSSS")}
_FILL_KEYS = {"S": 38, "H": 50, "M": 48, "L": 45, "F": 43, "K": 36}


def crash_key(kit: int) -> int:
    """The key of a crash cymbal; the orchestral kit has timpani where the others have it."""
    return 57 if kit == ORCHESTRA else KEYS["c"]


def _fill(dice: Random, metre: Metre, end: int, kit: int) -> list[Note]:
    """A fill that ends at tick `end`, growing louder."""
    pool = (_ROLLS if kit == ORCHESTRA else _FILLS)[metre.compound]
    step = TICKS // 3 if metre.compound else TICKS // 4
    fill = dice.choice([cells for cells in pool if len(cells) * step <= metre.bar])
    start = end - len(fill) * step
    return [Note(start + i * step, step, _FILL_KEYS[cell], 70 + 32 * i // len(fill))
            for i, cell in enumerate(fill) if cell != "."]


def _hits(bar: Bar, voices: list[list[str]], metre: Metre, calm: bool, kit: int) -> list[tuple[int, str, int]]:
    """The pattern's hits in a bar as (tick, letter, velocity)."""
    light, found = "light" in bar.parts, []
    soft_only = sum(letter in "hims" for letter, _ in voices) > 1
    for letter, cells in voices:
        for step, cell in enumerate(cells):
            tick = step * metre.step
            between = calm and letter in "him" and tick % TICKS
            thinned = light and (cell == "o" or (soft_only and letter in "hi" and tick % TICKS))
            if cell in _VELOCITY and not between and not thinned:
                played = _SOFTER.get(letter, letter) if light and kit != ORCHESTRA else letter
                found.append((tick, played, _VELOCITY[cell] - (12 if light else 0)))
    return found


def _variation(dice: Random, voices: list[list[str]], metre: Metre) -> list[tuple[int, str, int]]:
    """A small change at the end of four bars: an open hi-hat, a kick or a ghost note of the snare."""
    letters, last = {letter for letter, _ in voices}, metre.bar - metre.step * 2
    choices = [(last, "k", 84)] if "k" in letters else []
    choices += [(last, "o", 80)] if "h" in letters else []
    choices += [(metre.bar - metre.step, "s", 52)] if "s" in letters else []
    return [dice.choice(choices)] if choices else []


def play_drums(salt: str, bars: list[Bar], pattern: str, metre: Metre, calm: bool, kit: int) -> list[Note]:
    """A drum pattern through the piece. Bars that repeat one another draw the same.

    `calm` leaves the cymbals and shakers between the beats out, so that a slow pulse is not perceived as twice as fast.
    """
    voices = [line.split() for line in pattern.split("|")]
    beaten = any(letter in "ks" for letter, _ in voices)
    notes: list[Note] = []
    for number, bar in enumerate(bars):
        if not bar.parts & {"drums", "light"}:
            continue
        start, dice = number * metre.bar, Random(f"{salt} drums {bar.key}")
        hits = _hits(bar, voices, metre, calm, kit)
        hits += _variation(dice, voices, metre) if bar.place % 4 == 3 and not bar.fill and not calm else []
        fill = _fill(dice, metre, start + metre.bar, kit) if bar.fill and beaten else []
        first = min((note.start for note in fill), default=start + metre.bar)
        notes += [Note(start + tick, metre.step, KEYS[letter], velocity) for tick, letter, velocity in hits
                  if start + tick < first or letter in "kh"] + fill
        if bar.opens and beaten and "drums" in bar.parts and bar.section.label != "intro":
            notes.append(Note(start, TICKS, crash_key(kit), 76))
    return list({(note.start, note.pitch): note for note in notes}.values())
