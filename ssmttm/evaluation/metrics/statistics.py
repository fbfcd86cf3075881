"""Accuracy of predicted labels: confidence interval, tests against chance, shuffled control."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 2_000


@dataclass(frozen=True)
class LabelAccuracy:
    """How often `predicted` equals `expected`, and what chance gives."""

    n: int
    accuracy: float
    low: float  # 95 % interval (Wilson)
    high: float
    uniform: float  # chance of a guess among all classes
    majority: float  # chance of always predicting the most frequent class
    p_value: float  # binomial, one-sided, against the higher of the two
    shuffled: float  # mean accuracy over random pairings of prompts and clips
    shuffled_p: float  # fraction of those that are at least as accurate as the true one (one added to both counts)


def label_accuracy(expected: Sequence[str], predicted: Sequence[str], n_classes: int, seed: int = 0) -> LabelAccuracy:
    """Compare two lists of labels of one length, pair by pair and shuffled."""
    from scipy.stats import binomtest

    n = len(expected)
    if n == 0 or n != len(predicted):
        raise ValueError(f"{n} expected labels for {len(predicted)} predicted ones")
    labels, predictions = np.array(expected), np.array(predicted)
    correct = int((labels == predictions).sum())
    uniform, majority = 1 / n_classes, max(Counter(expected).values()) / n
    rng = np.random.default_rng(seed)
    shuffled = np.array([(labels[rng.permutation(n)] == predictions).sum() for _ in range(PERMUTATIONS)])
    test = binomtest(correct, n, max(uniform, majority), alternative="greater")
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return LabelAccuracy(
        n,
        correct / n,
        float(interval.low),
        float(interval.high),
        uniform=uniform,
        majority=majority,
        p_value=float(test.pvalue),
        shuffled=float(shuffled.mean()) / n,
        shuffled_p=(1 + int((shuffled >= correct).sum())) / (1 + PERMUTATIONS),
    )
