"""One-bar patterns laid over the harmony."""

import math
from collections.abc import Iterator
from random import Random

from data_prep.builtin.composition.score import Metre


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


def pulsing(rng: Random, patterns: tuple[str, ...], metre: Metre) -> str:
    """Draw a pattern, preferring about one event a beat, so that the beat (not its half or double) is perceived."""
    rates = [len(events(pattern)) / metre.beats for pattern in patterns]
    return rng.choices(patterns, [1 / (0.2 + abs(math.log2(rate))) for rate in rates])[0]


def lay(pattern: str, metre: Metre, slot: int, bar: int) -> Iterator[tuple[int, int, str]]:
    """A pattern in one bar, as (tick, length, character); a note across a chord change is repeated there."""
    for step, steps, char in events(pattern):
        start, end = bar * metre.bar + step * metre.step, bar * metre.bar + (step + steps) * metre.step
        while start < end:
            stop = min(end, (start // slot + 1) * slot)
            yield start, stop - start, char
            start = stop
