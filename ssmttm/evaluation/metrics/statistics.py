"""Agreement of labels: intervals, tests against chance, and the shuffled control. Pure functions."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 2_000


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % by default); (0, 1) for n = 0. Source: Wilson, JASA 22 (1927)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_tail(successes: int, n: int, chance: float) -> float:
    """The probability of at least this many successes in n draws at `chance` each: the one-sided p-value."""
    if successes <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    terms = (math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(successes, n + 1))
    return min(1.0, math.fsum(terms))


@dataclass(frozen=True)
class Agreement:
    """How often `detected` equals `expected`, beside what chance would give.

    Attributes:
        share, low, high: the agreement and its 95 % interval (Wilson).
        uniform: chance of a guess among all classes; majority: of always naming the prompts' commonest class.
        p_value: binomial, one-sided, against the higher of the two.
        shuffled: mean agreement when every prompt meets another prompt's music, over random permutations.
        shuffled_p: share of those permutations that agree at least as well as the true pairing (one added to both).
    """

    n: int
    share: float
    low: float
    high: float
    uniform: float
    majority: float
    p_value: float
    shuffled: float
    shuffled_p: float


def agreement_of(expected: Sequence[str], detected: Sequence[str], n_classes: int, seed: int = 0) -> Agreement:
    """Compare two lists of labels of one length, pair by pair and shuffled."""
    n = len(expected)
    if n == 0 or n != len(detected):
        raise ValueError(f"{n} expected labels for {len(detected)} detected ones")
    right = sum(a == b for a, b in zip(expected, detected, strict=True))
    uniform, majority = 1 / n_classes, max(Counter(expected).values()) / n
    rng = np.random.default_rng(seed)
    truth, answer = np.array(expected), np.array(detected)
    shuffled = np.array([(truth[rng.permutation(n)] == answer).sum() for _ in range(PERMUTATIONS)])
    return Agreement(
        n,
        right / n,
        *wilson(right, n),
        uniform=uniform,
        majority=majority,
        p_value=binomial_tail(right, n, max(uniform, majority)),
        shuffled=float(shuffled.mean()) / n,
        shuffled_p=(1 + int((shuffled >= right).sum())) / (1 + PERMUTATIONS),
    )
