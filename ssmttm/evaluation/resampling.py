"""Bootstrap intervals of the kernel distance and of the neighbourhoods, with every distance computed once.

A draw with replacement is a weight for each row, how often it was drawn; the figures of the drawn set follow from those
weights and the distances between all rows. The outcome is that of `distances.bootstrap` over the plain functions, with
the kernel's bandwidth that of the whole reference. Shapes: n and m rows, W windows of a clip, d width, q figures.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssmttm.evaluation.distances import NEIGHBOURS, Neighbourhoods, median_distance

MOST = 8_192  # rows of a set up to which its distances are held
_NEAR = 64  # neighbours of a row that are looked at before all are


class Apart(NamedTuple):
    """Distances within x [n, n], within y [m, m] and between them [n, m], float64."""

    x: Tensor
    y: Tensor
    between: Tensor


def distances_of(x: Tensor, y: Tensor) -> Apart:
    """All distances of rows [n, d] and [m, d]."""
    return Apart(torch.cdist(x, x), torch.cdist(y, y), torch.cdist(x, y))


def kernel_statistic(apart: Apart, y: Tensor) -> Callable[[Tensor, Tensor], list[float]]:
    """`distances.kernel_distance` as a function of weights [n] and [m]; y [m, d] sets the bandwidth."""
    bandwidth = median_distance(y)
    kernels = Apart(*((part / bandwidth).square().div(-2).exp() for part in apart))

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        n, m = weights_x.sum(), weights_y.sum()
        within_x = (weights_x @ kernels.x @ weights_x - n) / (n * (n - 1))
        within_y = (weights_y @ kernels.y @ weights_y - m) / (m * (m - 1))
        return [float(100 * (within_x + within_y - 2 * (weights_x @ kernels.between @ weights_y) / (n * m)))]

    return statistic


def neighbourhood_statistic(apart: Apart, k: int = NEIGHBOURS) -> Callable[[Tensor, Tensor], Neighbourhoods]:
    """`distances.precision_recall_coverage` as a function of weights [n] and [m]."""
    nearest = [part.sort(1) for part in (apart.x, apart.y)]

    def statistic(weights_x: Tensor, weights_y: Tensor) -> Neighbourhoods:
        around_x, around_y = (
            _radii(found.values, found.indices, weights, k)
            for found, weights in zip(nearest, (weights_x, weights_y), strict=True)
        )
        in_y, in_x = apart.between <= around_y, apart.between <= around_x[:, None]  # [n, m]
        covered = in_y[weights_x > 0].any(0)
        n, m = weights_x.sum(), weights_y.sum()
        return Neighbourhoods(
            precision=float(weights_x @ in_y.any(1).double() / n),
            recall=float(weights_y @ in_x.any(0).double() / m),
            coverage=float(weights_y @ covered.double() / m),
        )

    return statistic


def weighted_bootstrap(
    statistic: Callable[[Tensor, Tensor], list[float] | Neighbourhoods],
    clips_x: int,
    clips_y: int,
    windows: tuple[int, int] = (1, 1),
    draws: int = 100,
    seed: int = 0,
    title: str = "interval",
) -> list[tuple[float, float]]:
    """The 95 % interval of each of q figures around its value, drawing clips, as `distances.bootstrap` does.

    Args:
        statistic: of the weights of all rows of x and of y.
        windows: rows of a clip of x and of y, which are drawn together.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = clips_x, clips_y

    def weights(rows: Tensor, place: int) -> Tensor:
        return torch.bincount(rows, minlength=counts[place]).double().repeat_interleave(windows[place])

    values = []
    for _ in tqdm(range(draws), desc=title, unit="draw", leave=False):
        drawn = [torch.randint(count, (count,), generator=generator) for count in counts]
        values.append(statistic(*(weights(rows, place) for place, rows in enumerate(drawn))))
    whole = statistic(*(weights(torch.arange(count), place) for place, count in enumerate(counts)))
    spread = np.array(values) - np.mean(values, 0)  # [draws, q]
    low, high = np.quantile(spread, (0.025, 0.975), axis=0) + np.array(whole)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _radii(values: Tensor, order: Tensor, weights: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other drawn row, -1 for rows that were not drawn. [n]

    Args:
        values, order: [n, n], distances from each row, the nearest first, and to which row.
    """
    for near in (_NEAR, len(values)):
        reached = weights[order[:, :near]].cumsum(1) > k  # a row and its copies are the nearest
        if bool(reached[:, -1].all()):
            break
    place = reached.int().argmax(1)
    return torch.where(weights > 0, values.gather(1, place[:, None])[:, 0], -1.0)
