"""Distances between what was generated and what is real, as pure functions of embeddings, posteriors and cosines.

x is what is judged, y the reference. Everything is computed in float64. Shapes: n (and m) clips or windows, d width of
an embedding, N classes.
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from ssmttm.errors import UserError

FEW = 256  # below so many rows, a Fréchet distance says more about n than about the music
FEWEST = 20  # samples that can be extrapolated from
NEIGHBOURS = 5  # that make a neighbourhood
_BLOCK = 1_024  # rows whose distances are held at a time
_MEDIAN_ROWS = 4_096  # rows, evenly spaced, of which a bandwidth is the median distance
_LEAST = 1e-6  # of a class's probability
_log = logging.getLogger(__name__)


class Extrapolated(NamedTuple):
    """A distance extrapolated to infinitely many samples, and the 95 % interval of the fit."""

    value: float
    low: float
    high: float


def frechet_distance(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
    """Fréchet distance between the Gaussians of two sets: |mean difference|^2 + Tr(Sx + Sy - 2 (Sx Sy)^(1/2)).

    On audio embeddings it is the FAD of Kilgour et al. (arXiv 1812.08466); the formula is Dowson and Landau's (1982).
    The last trace is that of the symmetric (Sx^(1/2) Sy Sx^(1/2))^(1/2), by eigenvalues: never negative, never complex,
    whatever the rank. Estimated from few samples it is too large; a warning says so.

    Args:
        x, y: [n, d] and [m, d].

    Raises:
        UserError: fewer than 2 rows, other widths, NaN or infinity.
    """
    x, y = _sets(x, y)
    _warn_of_few(x, y)
    return frechet_distance_unchecked(x, y)


def frechet_distance_unchecked(x: Tensor, y: Tensor) -> float:
    """`frechet_distance` of float64 sets that were checked before, for the many draws of a bootstrap."""
    return _frechet(x, *_gaussian(y))


def frechet_distance_infinity(
    x: ArrayLike | Tensor, y: ArrayLike | Tensor, seed: int = 0, points: int = 20
) -> Extrapolated:
    """The Fréchet distance that infinitely many samples of x would have: FAD-infinity (arXiv 2311.01616, 1911.07023).

    The distance of seeded subsets of x falls about linearly in 1/n; the line's value at 1/n = 0 is given, with the
    interval of the regression, which knows of the subsets' scatter and not of the choice of x and y.

    Args:
        x, y: [n, d] and [m, d].
        points: subset sizes, from a tenth of n (at least 2 d or half of n, whichever is less) to n.

    Raises:
        UserError: as `frechet_distance`, or n below 20.
    """
    x, y = _sets(x, y)
    if len(x) < FEWEST:
        raise UserError(f"{len(x)} samples are too few to extrapolate from: give {FEWEST}, better some hundreds")
    _warn_of_few(x, y)
    reference = _gaussian(y)
    generator = torch.Generator().manual_seed(seed)
    least = max(len(x) // 10, min(2 * x.shape[1], len(x) // 2), 4)
    sizes = np.linspace(least, len(x), points).round().astype(int)
    bar = tqdm(sizes, desc="fad_infinity", unit="subset", leave=False)
    values = [_frechet(x[torch.randperm(len(x), generator=generator)[:size]], *reference) for size in bar]
    return _intercept(1 / sizes, np.array(values))


def kernel_distance(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
    """KAD (arXiv 2502.15602): 100 times the unbiased squared MMD, Gaussian kernel, bandwidth the reference's median.

    Not biased by the number of samples, hence negative at times where the sets are alike.

    Args:
        x: [n, d], what is judged.
        y: [m, d], the reference: the median distance between its rows is the kernel's bandwidth.

    Raises:
        UserError: as `frechet_distance`.
    """
    x, y = _sets(x, y)
    bandwidth = median_distance(y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x, bandwidth) - n) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, bandwidth) - m) / (m * (m - 1))
    return 100 * (within_x + within_y - 2 * _kernel_sum(x, y, bandwidth) / (n * m))


class PrecisionRecallCoverage(NamedTuple):
    """Shares from 0 to 1.

    precision: of x within y's neighbourhoods; recall: of y within x's (Kynkäänniemi et al., arXiv 1904.06991).
    coverage: of y's neighbourhoods that hold some of x (Naeem et al., arXiv 2002.09797).
    """

    precision: float
    recall: float
    coverage: float


def precision_recall_coverage(x: ArrayLike | Tensor, y: ArrayLike | Tensor, k: int = NEIGHBOURS) -> PrecisionRecallCoverage:
    """Does x sound like y (precision), and is all of y in x (recall, coverage)? By the balls of k nearest neighbours.

    Args:
        x, y: [n, d] and [m, d], n and m above k.

    Raises:
        UserError: as `frechet_distance`, or not more than k rows.
    """
    x, y = _sets(x, y)
    if min(len(x), len(y)) <= k:
        raise UserError(f"{min(len(x), len(y))} samples have no {k} nearest neighbours: give more")
    apart = torch.cat([torch.cdist(rows, y) for rows in blocks(x, _BLOCK, "distances")])  # [n, m]
    around_x, around_y = _radii(x, k), _radii(y, k)
    return PrecisionRecallCoverage(
        precision=float((apart <= around_y).any(1).double().mean()),
        recall=float((apart <= around_x[:, None]).any(0).double().mean()),
        coverage=float((apart <= around_y).any(0).double().mean()),
    )


def class_divergence(generated: ArrayLike | Tensor, reference: ArrayLike | Tensor) -> Tensor:
    """KL divergence of each generated clip's class posteriors from those of its reference, in nats. [n]

    KL(reference || generated), as audio generation is judged since AudioGen (arXiv 2209.15352); probabilities are kept
    above 1e-6 and made to sum to 1 again.

    Args:
        generated, reference: [n, N], row by row of the same prompt.

    Raises:
        UserError: other shapes, or rows that are no distribution.
    """
    p, q = _matrix(reference, "the reference's posteriors"), _matrix(generated, "the generated posteriors")
    if p.shape != q.shape:
        raise UserError(f"{list(q.shape)} posteriors cannot be paired with {list(p.shape)}: give one row a prompt each")
    for rows in (p, q):
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones(len(rows)).double(), atol=1e-3):
            raise UserError("posteriors must be at least 0 and sum to 1 in every row: apply a softmax first")
    p, q = ((rows.clamp_min(_LEAST) / rows.clamp_min(_LEAST).sum(1, keepdim=True)) for rows in (p, q))
    return (p * (p.log() - q.log())).sum(1)


def clap_score(audio: ArrayLike | Tensor, text: ArrayLike | Tensor) -> Tensor:
    """Cosine between each clip's embedding and its caption's. [n]

    Args:
        audio, text: [n, d] in one space (CLAP, arXiv 2211.06687), row by row of the same prompt.

    Raises:
        UserError: other shapes, NaN or infinity.
    """
    a, t = _matrix(audio, "the audio's embeddings"), _matrix(text, "the text's embeddings")
    if a.shape != t.shape:
        raise UserError(f"{list(a.shape)} clips cannot be paired with {list(t.shape)} captions: give one row a prompt")
    return torch.nn.functional.cosine_similarity(a, t, dim=1)


def bootstrap(
    statistic: Callable[..., float],
    *samples: Tensor,
    paired: bool = False,
    draws: int = 200,
    seed: int = 0,
    title: str = "interval",
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic around its value.

    Rows are drawn with replacement, of each set anew or (`paired`) the same of all. Repeated rows shift a Fréchet or
    kernel distance upwards; so the spread is taken about the draws' own mean and laid around the estimate.

    Args:
        samples: tensors [n, ...], handed to `statistic` in this order.
        title: of the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        rows = [torch.randint(len(s), (len(s),), generator=generator) for s in samples]
        return statistic(*(s[rows[0] if paired else r] for s, r in zip(samples, rows, strict=True)))

    values = np.array([draw() for _ in tqdm(range(draws), desc=title, unit="draw", leave=False)])
    low, high = np.quantile(values - values.mean(), (0.025, 0.975)) + statistic(*samples)
    return float(low), float(high)


def _matrix(values: ArrayLike | Tensor, name: str) -> Tensor:
    """[n, d], float64 on the CPU."""
    matrix = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise UserError(f"{name} have the shape {list(matrix.shape)}: give [n, d], one row a clip")
    if not bool(matrix.isfinite().all()):
        raise UserError(f"{name} hold NaN or infinity: leave out the clips that they come from")
    return matrix


def _sets(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    x, y = _matrix(x, "the judged embeddings"), _matrix(y, "the reference embeddings")
    if x.shape[1] != y.shape[1]:
        raise UserError(f"embeddings of width {x.shape[1]} and {y.shape[1]} cannot be compared: use one embedder")
    if min(len(x), len(y)) < 2:
        raise UserError(f"{len(x)} and {len(y)} embeddings have no distribution: give at least 2 of each, better {FEW}")
    return x, y


def _warn_of_few(x: Tensor, y: Tensor) -> None:
    fewest = min(len(x), len(y))
    if fewest < max(FEW, x.shape[1] + 1):
        _log.warning(
            "%d samples in %d dimensions are few for a Fréchet distance, which is then too large: compare it only with "
            "others of the same numbers, or look at the kernel distance",
            fewest,
            x.shape[1],
        )


def _gaussian(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [d], covariance [d, d] and its symmetric square root."""
    covariance = torch.cov(y.T).reshape(y.shape[1], y.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    return y.mean(0), covariance, (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _frechet(x: Tensor, mean: Tensor, covariance: Tensor, root: Tensor) -> float:
    """Distance of x from a reference that `_gaussian` has described."""
    own = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    shared = torch.linalg.eigvalsh(root @ own @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def _intercept(x: np.ndarray, y: np.ndarray) -> Extrapolated:
    """Least squares y = a + b x: a, with its 95 % interval (Student's t)."""
    from scipy import stats

    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.intercept_stderr
    return Extrapolated(float(fit.intercept), float(fit.intercept - half), float(fit.intercept + half))


def blocks(rows: Tensor, size: int, title: str) -> Iterable[Tensor]:
    """So many rows at a time, with a progress bar where they are more than one block."""
    parts = rows.split(size)
    return tqdm(parts, desc=title, unit="block", leave=False, disable=len(parts) < 2)


def median_distance(y: Tensor) -> float:
    """The median distance between two rows; the smallest positive number if all are alike."""
    rows = y[:: -(-len(y) // _MEDIAN_ROWS)]
    distances = torch.nn.functional.pdist(rows)
    return max(float(distances.median()), torch.finfo(torch.float64).tiny)


def _kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Sum of exp(-|x_i - y_j|^2 / (2 bandwidth^2)) over all pairs."""
    bar = blocks(x, _BLOCK, "kernels")
    return sum(float((torch.cdist(rows, y) / bandwidth).square().div(-2).exp().sum()) for rows in bar)


def _radii(y: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row. [m]"""
    return torch.cat([torch.cdist(rows, y).kthvalue(k + 1, dim=1).values for rows in blocks(y, _BLOCK, "radii")])
