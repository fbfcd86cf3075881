"""Fréchet audio distance (FAD), and its extrapolation to infinitely many samples."""

import logging

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.bootstrap import Interval, Statistic
from ssmttm.evaluation.metrics.inputs import check_sets

FEW_SAMPLES = 256  # fewer samples bias the distance upwards by more than models differ
MIN_EXTRAPOLATED = 20  # samples for FAD-infinity
_log = logging.getLogger(__name__)


def frechet_distance(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
    """Fréchet distance between the Gaussians of two sets: |mean difference|^2 + Tr(Sx + Sy - 2 (Sx Sy)^(1/2)).

    On audio embeddings it is the FAD of Kilgour et al. (arXiv 1812.08466); the formula is Dowson and Landau's (1982).
    The last trace is that of the symmetric (Sx^(1/2) Sy Sx^(1/2))^(1/2), by eigenvalues: never negative or complex,
    whatever the rank. The estimate from few samples is too large, which is logged as a warning.
    x, y: generated [n, d] and reference [m, d].
    """
    x, y = check_sets(x, y)
    _warn_if_few(x, y)
    return _distance(_moments(x), _Reference(y))


def frechet_statistic(x: Tensor, y: Tensor) -> Statistic:
    """`frechet_distance` of clips x [n, W, d] and y [m, V, d] as a function of their weights [n] and [m]."""
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        counts_x = weights_x.long().repeat_interleave(x.shape[1])
        counts_y = weights_y.long().repeat_interleave(y.shape[1])
        return [_distance(_moments(rows_x, counts_x), _Reference(rows_y, counts_y))]

    return statistic


def frechet_distance_infinity(
    x: ArrayLike | Tensor, y: ArrayLike | Tensor, seed: int = 0, points: int = 20
) -> Interval:
    """FAD-infinity: the Fréchet distance extrapolated to infinitely many samples of x (arXiv 2311.01616, 1911.07023).

    The distance of random subsets of x is about linear in 1/n; the value is the line's intercept. The interval is that
    of the regression: it covers the scatter of the subsets, not the choice of x and y. `points` is the number of subset
    sizes, from a tenth of n (at least the smaller of 2 d and n / 2) to n.

    The value is negative, and kept so, where the line overshoots: the sets are alike, x is a part of y, or n is small
    beside d. It means no more than "not distinguishable by this estimate", and is logged as a warning.
    """
    from scipy import stats

    x, y = check_sets(x, y)
    if len(x) < MIN_EXTRAPOLATED:
        raise UserError(f"FAD-infinity needs at least {MIN_EXTRAPOLATED} samples, better some hundreds, got {len(x)}")
    _warn_if_few(x, y)
    reference = _Reference(y)
    generator = torch.Generator().manual_seed(seed)
    smallest = max(len(x) // 10, min(2 * x.shape[1], len(x) // 2), 4)
    sizes = np.linspace(smallest, len(x), points).round().astype(int)
    values = []
    for size in tqdm(sizes, desc="fad_infinity", unit="subset", leave=False):
        values.append(_distance(_moments(x[torch.randperm(len(x), generator=generator)[:size]]), reference))
    fit = stats.linregress(1 / sizes, values)
    half = stats.t.ppf(0.975, points - 2) * fit.intercept_stderr
    if fit.intercept < 0:
        _log.warning("%s", negative_note("fad_infinity", fit.intercept))
    return Interval(float(fit.intercept), float(fit.intercept - half), float(fit.intercept + half))


def negative_note(name: str, value: float) -> str:
    """What a negative FAD-infinity means."""
    return (
        f"{name} is {value:.4g}, but a distance is never negative: the extrapolated line overshoots, because the sets "
        "are alike, overlap, or are small; take it as 0, and rank by fad or kad at equal numbers"
    )


def _moments(x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of rows [n, d], each counted `counts` times."""
    mean = x.mean(0) if counts is None else counts.double() @ x / counts.sum()
    return mean, torch.cov(x.T, fweights=counts).reshape(x.shape[1], x.shape[1])


class _Reference:
    """Mean, covariance and the covariance's symmetric square root."""

    def __init__(self, y: Tensor, counts: Tensor | None = None) -> None:
        self.mean, self.covariance = _moments(y, counts)
        values, vectors = torch.linalg.eigh(self.covariance)
        self.root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _distance(moments: tuple[Tensor, Tensor], reference: _Reference) -> float:
    mean, covariance = moments
    shared = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp_min(0).sqrt().sum()
    trace = covariance.trace() + reference.covariance.trace() - 2 * shared
    return max(0.0, float((mean - reference.mean).square().sum() + trace))


def _warn_if_few(x: Tensor, y: Tensor) -> None:
    fewest = min(len(x), len(y))
    if fewest < max(FEW_SAMPLES, x.shape[1] + 1):
        _log.warning(
            "%d samples in %d dimensions are few for a Fréchet distance, which is then too large: compare it only with "
            "distances of equally many samples, or use the kernel distance",
            fewest,
            x.shape[1],
        )
