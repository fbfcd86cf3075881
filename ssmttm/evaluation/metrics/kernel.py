"""Kernel audio distance (KAD, arXiv 2502.15602)."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.evaluation.metrics.bootstrap import Statistic
from ssmttm.evaluation.metrics.inputs import BLOCK_ROWS, blocks, check_sets

_MEDIAN_ROWS = 4_096  # evenly spaced rows from which the bandwidth is computed


def kernel_distance(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> float:
    """KAD: 100 times the unbiased squared MMD with a Gaussian kernel.

    The number of samples does not bias it; so it can be negative where the sets are alike. The bandwidth is the median
    distance between the rows of the reference. x, y: generated [n, d] and reference [m, d].
    """
    x, y = check_sets(x, y)
    bandwidth = median_distance(y)
    xx, yy, xy = (float(_kernel_sums(a[:, None], b[None], bandwidth).sum()) for a, b in ((x, x), (y, y), (x, y)))
    return _mmd(xx, yy, xy, len(x), len(y))


def kernel_statistic(x: Tensor, y: Tensor) -> Statistic:
    """`kernel_distance` of clips x [n, W, d] and y [m, V, d] as a function of their weights [n] and [m].

    The bandwidth is that of the whole reference.
    """
    bandwidth = median_distance(y.flatten(0, 1))
    sums_xx, sums_yy, sums_xy = (_kernel_sums(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        n, m = float(weights_x.sum()) * x.shape[1], float(weights_y.sum()) * y.shape[1]
        xx = float(weights_x @ sums_xx @ weights_x)
        yy = float(weights_y @ sums_yy @ weights_y)
        return [_mmd(xx, yy, float(weights_x @ sums_xy @ weights_y), n, m)]

    return statistic


def median_distance(y: Tensor) -> float:
    """Median distance between two rows of [m, d]; the smallest positive number if all rows are equal."""
    rows = y[:: -(-len(y) // _MEDIAN_ROWS)]
    distances = torch.nn.functional.pdist(rows)
    return max(float(distances.median()), torch.finfo(torch.float64).tiny)


def _mmd(xx: float, yy: float, xy: float, n: float, m: float) -> float:
    """100 times the unbiased squared MMD from the kernel sums over all pairs of n and m rows."""
    return 100 * ((xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m))


def _kernel_sums(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x_i - y_j|^2 / (2 bandwidth^2)), summed over the windows of each pair of clips: [n, m]."""
    rows, (clips, windows) = y.flatten(0, 1), y.shape[:2]
    sums = []
    for part in blocks(x, max(1, BLOCK_ROWS // x.shape[1]), "kernels"):
        kernels = torch.cdist(part.flatten(0, 1), rows).div_(bandwidth).square_().div_(-2).exp_()
        sums.append(kernels.view(len(part), x.shape[1], clips, windows).sum((1, 3)))
    return torch.cat(sums)
