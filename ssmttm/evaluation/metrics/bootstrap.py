"""Bootstrap confidence intervals (95 %).

A resample is a weight for each clip: how often it was drawn. Statistics are functions of these weights, so that
distances between clips are computed once and not for every resample.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

Statistic = Callable[..., Sequence[float] | np.ndarray]  # of the weights of each set, float64 [n]
_QUANTILES = (0.025, 0.975)


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic, *sizes: int, draws: int = 100, seed: int = 0, centred: bool = True, title: str = "interval"
) -> list[Interval]:
    """Bootstrap interval of each value of a statistic of sets with these sizes, resampled independently.

    With `centred`, the resamples' values are shifted to a mean of the value itself, because repeated clips bias a
    distance upwards. A statistic may be NaN for a resample.
    """
    generator = torch.Generator().manual_seed(seed)
    values: list[np.ndarray] = []
    for _ in tqdm(range(draws), desc=title, unit="draw", leave=False):
        rows = [torch.randint(size, (size,), generator=generator) for size in sizes]
        weights = [torch.bincount(drawn, minlength=len(drawn)).double() for drawn in rows]
        values.append(np.asarray(statistic(*weights)))
    value = np.array(statistic(*(torch.ones(size).double() for size in sizes)))
    low, high = np.nanquantile(np.array(values), _QUANTILES, axis=0)
    shift = value - np.nanmean(values, axis=0) if centred else 0.0
    return [Interval(*map(float, row)) for row in zip(value, low + shift, high + shift, strict=True)]


def mean_interval(values: np.ndarray, draws: int = 1_000) -> Interval:
    """Mean of [n] and its percentile bootstrap interval; of a single value, the value itself."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.mean, n_resamples=draws, method="percentile", rng=rng).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
