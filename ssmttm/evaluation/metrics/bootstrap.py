"""Bootstrap intervals of the kernel distance and of the neighbourhoods, with every distance computed once.

A draw with replacement is a weight for each clip, how often it was drawn; the figures of the drawn set follow from
those weights, sums of kernels over pairs of clips, and each row's nearest neighbours. The outcome is that of
`distances.bootstrap` over the plain functions, with the kernel's bandwidth that of the whole reference. No matrix of
all distances is held. Shapes: n and m clips of W windows (V of the reference), d width, q figures.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssmttm.evaluation.metrics.distances import NEIGHBOURS, blocks, median_distance

_NEAR = 64  # neighbours of a row that are kept; a draw that needs more looks at all for that row
_ROWS = 256  # whose distances are held at a time

Statistic = Callable[[Tensor, Tensor], Sequence[float]]


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def kernel_statistic(x: Tensor, y: Tensor) -> Statistic:
    """`distances.kernel_distance` of x [n, W, d] and y [m, V, d] as a function of weights [n] and [m]."""
    bandwidth = median_distance(y.flatten(0, 1))
    within_x, within_y, between = (_kernel_sums(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        n, m = weights_x.sum() * x.shape[1], weights_y.sum() * y.shape[1]
        of_x = (weights_x @ within_x @ weights_x - n) / (n * (n - 1))
        of_y = (weights_y @ within_y @ weights_y - m) / (m * (m - 1))
        return [float(100 * (of_x + of_y - 2 * (weights_x @ between @ weights_y) / (n * m)))]

    return statistic


def manifold_statistic(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> Statistic:
    """`distances.precision_recall_coverage` of x [n, W, d] and y [m, V, d] as a function of weights [n] and [m]."""
    rows = x.flatten(0, 1), y.flatten(0, 1)
    balls_x, balls_y = _Manifolds(rows[0], rows[1], k), _Manifolds(rows[1], rows[0], k)

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        of_x, of_y = weights_x.repeat_interleave(x.shape[1]), weights_y.repeat_interleave(y.shape[1])
        in_y, covered = balls_y.hits(of_y, of_x)
        in_x, _ = balls_x.hits(of_x, of_y)
        precision, recall, coverage = of_x @ in_y / of_x.sum(), of_y @ in_x / of_y.sum(), of_y @ covered / of_y.sum()
        return [float(precision), float(recall), float(coverage)]

    return statistic


def weighted_bootstrap(
    statistic: Statistic, clips_x: int, clips_y: int, draws: int = 100, seed: int = 0, title: str = "interval"
) -> list[Interval]:
    """Each of q figures with its 95 % interval around the value, drawing clips, as `distances.bootstrap` does.

    Args:
        statistic: q figures of the weights of the clips of x and of y.
        title: of the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = clips_x, clips_y
    values = []
    for _ in tqdm(range(draws), desc=title, unit="draw", leave=False):
        drawn = [torch.randint(count, (count,), generator=generator) for count in counts]
        values.append(statistic(*(torch.bincount(rows, minlength=len(rows)).double() for rows in drawn)))
    whole = np.array(statistic(*(torch.ones(count).double() for count in counts)))
    low, high = np.quantile(np.array(values) - np.mean(values, 0), (0.025, 0.975), axis=0) + whole
    return [Interval(*map(float, found)) for found in zip(whole, low, high, strict=True)]


class _Manifolds:
    """Around each drawn row the ball up to its k-th nearest other drawn row, and which rows of the other set it holds.

    Args:
        centres, others: rows [m, d] and [n, d].
    """

    def __init__(self, centres: Tensor, others: Tensor, k: int) -> None:
        self._centres, self._others, self._k = centres, others, k
        nearest, pairs = [], []
        for block, rows in enumerate(blocks(centres, _ROWS, "neighbours")):
            nearest.append(torch.cdist(rows, centres).topk(min(_NEAR, len(centres)), largest=False))
            apart = torch.cdist(rows, others)
            centre, other = (apart <= nearest[-1].values[:, -1:]).nonzero(as_tuple=True)
            pairs.append((centre + block * _ROWS, other, apart[centre, other]))
        self._values, self._order = (torch.cat(parts) for parts in zip(*nearest, strict=True))  # [m, near]
        self._pairs = [torch.cat(parts) for parts in zip(*pairs, strict=True)]  # centre, other and distance of each

    def hits(self, weights: Tensor, weights_others: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the others within a drawn ball [n], and balls that hold a drawn row of the others [m], 0 or 1.

        Args:
            weights, weights_others: how often each row was drawn, [m] and [n].
        """
        radii, known = _radii(self._values, self._order, weights, self._k)
        radii = torch.where((weights > 0) & known, radii, -1.0)
        centre, other, apart = self._pairs
        inside = apart <= radii[centre]
        found = [(centre[inside], other[inside])]
        for rows in ((weights > 0) & ~known).nonzero()[:, 0].split(_ROWS):
            values, order = torch.cdist(self._centres[rows], self._centres).sort(1)
            wide, _ = _radii(values, order, weights, self._k)
            place, further = (torch.cdist(self._centres[rows], self._others) <= wide[:, None]).nonzero(as_tuple=True)
            found.append((rows[place], further))
        centre, other = (torch.cat(parts) for parts in zip(*found, strict=True))
        within, holding = torch.zeros_like(weights_others), torch.zeros_like(weights)
        within[other] = 1
        holding[centre[weights_others[other] > 0]] = 1
        return within, holding


def _radii(values: Tensor, order: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distance of each row to its k-th nearest other drawn row, and whether that lies among those that are listed.

    Args:
        values, order: [rows, near], distances of the nearest rows, the nearest first, and which they are.
    """
    reached = weights[order].cumsum(1) > k  # a row and its copies are the nearest
    place = reached.int().argmax(1, keepdim=True)
    return values.gather(1, place)[:, 0], reached[:, -1]


def _kernel_sums(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x_i - y_j|^2 / (2 bandwidth^2)), summed over the windows of each pair of clips: [n, m]."""
    rows, (clips, windows) = y.flatten(0, 1), y.shape[:2]
    sums = []
    for part in blocks(x, max(1, _ROWS // x.shape[1]), "kernels"):
        kernels = torch.cdist(part.flatten(0, 1), rows).div_(bandwidth).square_().div_(-2).exp_()
        sums.append(kernels.view(len(part), x.shape[1], clips, windows).sum((1, 3)))
    return torch.cat(sums)
