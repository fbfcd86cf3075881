"""MAUVE audio divergence (MAD, arXiv 2503.16669): -log of MAUVE (arXiv 2102.01454) of audio embeddings."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.evaluation.metrics.bootstrap import Statistic
from ssmttm.evaluation.metrics.inputs import check_sets

_ROWS_PER_CLUSTER = 10
_EXPLAINED_VARIANCE = 0.9
_SCALE = 5.0  # c of MAUVE, equation 3
_POINTS = 25  # of the divergence curve
_STARTS = 5  # of k-means, of which the best is kept


def mauve_divergence(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
    """MAD: 0 where generated x [n, d] and reference y [m, d] fall into the same clusters in the same proportions.

    Rows are normalised, projected on the principal components with 90 % of the variance and clustered by k-means
    into min(n, m) / 10 clusters, all with the settings of mauve-text 0.4. k-means is scipy's, so that values differ
    from that package's as its own do between seeds.
    """
    x, y = check_sets(x, y)
    statistic = mauve_statistic(x[:, None], y[:, None])
    return statistic(torch.ones(len(x)).double(), torch.ones(len(y)).double())[0]


def mauve_statistic(x: Tensor, y: Tensor) -> Statistic:
    """`mauve_divergence` of clips x [n, W, d] and y [m, V, d] as a function of their weights [n] and [m].

    The clusters are those of the whole sets.
    """
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)
    n_clusters = max(2, round(min(len(rows_x), len(rows_y)) / _ROWS_PER_CLUSTER))
    labels = _clusters(torch.cat([rows_x, rows_y]).numpy(), n_clusters)
    labels_x, labels_y = labels[: len(rows_x)], labels[len(rows_x) :]

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        p = np.bincount(labels_x, np.repeat(weights_x, x.shape[1]), n_clusters)
        q = np.bincount(labels_y, np.repeat(weights_y, y.shape[1]), n_clusters)
        return [-float(np.log(mauve(p / p.sum(), q / q.sum())))]

    return statistic


def mauve(p: np.ndarray, q: np.ndarray) -> float:
    """Area under the divergence curve of two histograms [k], in (0, 1] (arXiv 2102.01454, equation 3)."""
    from scipy.special import rel_entr

    weights = np.linspace(1e-6, 1 - 1e-6, _POINTS)[:, None]
    mixtures = weights * p + (1 - weights) * q  # [points, k], from q to p
    curve_q = np.array([1.0, *np.exp(-_SCALE * rel_entr(q, mixtures).sum(1)), 0.0])
    curve_p = np.array([0.0, *np.exp(-_SCALE * rel_entr(p, mixtures).sum(1)), 1.0])
    order_q, order_p = np.lexsort((-curve_p, curve_q)), np.lexsort((-curve_q, curve_p))  # of equal ones the upper first
    area_q = np.trapezoid(curve_p[order_q], curve_q[order_q])
    area_p = np.trapezoid(curve_q[order_p], curve_p[order_p])
    return float(area_q + area_p) / 2


def _clusters(rows: np.ndarray, n_clusters: int) -> np.ndarray:
    """Cluster [n] of each row [n, d]."""
    from scipy.cluster.vq import kmeans2

    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    rows = rows - rows.mean(0)
    _, singular, components = np.linalg.svd(rows, full_matrices=False)
    explained = np.cumsum(singular**2) / max(float((singular**2).sum()), np.finfo(np.float64).tiny)
    projected = rows @ components[: int(np.argmax(explained >= _EXPLAINED_VARIANCE)) + 1].T
    best, labels = np.inf, np.zeros(len(rows), dtype=np.int64)
    for seed in range(_STARTS):
        centres, found = kmeans2(projected, n_clusters, iter=100, minit="++", missing="warn", rng=seed)
        distance = float(np.square(projected - centres[found]).sum())
        if distance < best:
            best, labels = distance, found
    return labels
