"""Precision, recall and coverage by k-nearest-neighbour manifolds."""

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.bootstrap import Statistic
from ssmttm.evaluation.metrics.inputs import BLOCK_ROWS, blocks, check_sets

NEIGHBOURS = 5
_NEAREST = 64  # neighbours of a row that are kept; a resample that needs more computes all distances of that row


class PrecisionRecallCoverage(NamedTuple):
    """Fractions from 0 to 1.

    precision: of x within y's manifold; recall: of y within x's manifold (Kynkäänniemi et al., arXiv 1904.06991).
    coverage: of y's neighbourhoods that contain some of x (Naeem et al., arXiv 2002.09797).
    """

    precision: float
    recall: float
    coverage: float


def precision_recall_coverage(
    x: ArrayLike | Tensor, y: ArrayLike | Tensor, k: int = NEIGHBOURS
) -> PrecisionRecallCoverage:
    """Precision, recall and coverage of generated x [n, d] against reference y [m, d], n and m above k."""
    x, y = check_sets(x, y)
    if min(len(x), len(y)) <= k:
        raise UserError(f"{k} nearest neighbours need more than {k} samples of each set, got {min(len(x), len(y))}")
    statistic = prdc_statistic(x[:, None], y[:, None], k)
    return PrecisionRecallCoverage(*statistic(torch.ones(len(x)).double(), torch.ones(len(y)).double()))


def prdc_statistic(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> Statistic:
    """`precision_recall_coverage` of clips x [n, W, d] and y [m, V, d] as a function of their weights [n] and [m]."""
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)
    manifold_x, manifold_y = _Manifold(rows_x, rows_y, k), _Manifold(rows_y, rows_x, k)

    def statistic(weights_x: Tensor, weights_y: Tensor) -> list[float]:
        of_x, of_y = weights_x.repeat_interleave(x.shape[1]), weights_y.repeat_interleave(y.shape[1])
        x_inside, covered = manifold_y.membership(of_y, of_x)
        y_inside, _ = manifold_x.membership(of_x, of_y)
        precision, recall = of_x @ x_inside / of_x.sum(), of_y @ y_inside / of_y.sum()
        return [float(precision), float(recall), float(of_y @ covered / of_y.sum())]

    return statistic


class _Manifold:
    """Balls around the rows of one set [m, d] up to the k-th nearest neighbour, and the rows of another set inside."""

    def __init__(self, centres: Tensor, others: Tensor, k: int) -> None:
        self._centres, self._others, self._k = centres, others, k
        nearest, pairs = [], []
        for block, rows in enumerate(blocks(centres, BLOCK_ROWS, "neighbours")):
            nearest.append(torch.cdist(rows, centres).topk(min(_NEAREST, len(centres)), largest=False))
            distances = torch.cdist(rows, others)
            centre, other = (distances <= nearest[-1].values[:, -1:]).nonzero(as_tuple=True)
            pairs.append((centre + block * BLOCK_ROWS, other, distances[centre, other]))
        self._values, self._order = (torch.cat(parts) for parts in zip(*nearest, strict=True))  # [m, nearest]
        self._pairs = [torch.cat(parts) for parts in zip(*pairs, strict=True)]  # centre, other, distance

    def membership(self, weights: Tensor, weights_others: Tensor) -> tuple[Tensor, Tensor]:
        """Which others are inside a drawn ball [n], and which balls contain a drawn other [m], 0 or 1."""
        radii, known = _radii(self._values, self._order, weights, self._k)
        radii = torch.where((weights > 0) & known, radii, -1.0)
        centre, other, distances = self._pairs
        inside = distances <= radii[centre]
        found = [(centre[inside], other[inside])]
        for rows in ((weights > 0) & ~known).nonzero()[:, 0].split(BLOCK_ROWS):
            values, order = torch.cdist(self._centres[rows], self._centres).sort(1)
            radii, _ = _radii(values, order, weights, self._k)
            place, more = (torch.cdist(self._centres[rows], self._others) <= radii[:, None]).nonzero(as_tuple=True)
            found.append((rows[place], more))
        centre, other = (torch.cat(parts) for parts in zip(*found, strict=True))
        others_inside, nonempty = torch.zeros_like(weights_others), torch.zeros_like(weights)
        others_inside[other] = 1
        nonempty[centre[weights_others[other] > 0]] = 1
        return others_inside, nonempty


def _radii(values: Tensor, order: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distance of each row to its k-th nearest other drawn row, and whether that row is among the `nearest` ones.

    values, order [rows, nearest]: distances of the nearest rows in ascending order, and their indices.
    """
    reached = weights[order].cumsum(1) > k  # a row and its copies are the nearest
    place = reached.int().argmax(1, keepdim=True)
    return values.gather(1, place)[:, 0], reached[:, -1]
