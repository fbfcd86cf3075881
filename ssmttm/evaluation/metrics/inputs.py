"""Checks of the metrics' inputs, and iteration in blocks."""

from collections.abc import Iterable

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from ssmttm.errors import UserError

BLOCK_ROWS = 256  # rows whose distances are in memory at once


def check_matrix(values: ArrayLike | Tensor, name: str) -> Tensor:
    """Check values [n, d] and convert them to float64 on the CPU."""
    matrix = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise UserError(f"{name} must have the shape [n, d], one row a clip, got {list(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise UserError(f"{name} contain NaN or infinity: remove the clips that they come from")
    return matrix


def check_sets(x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of at least 2 embeddings, [n, d] and [m, d], and convert them to float64."""
    x, y = check_matrix(x, "the generated embeddings"), check_matrix(y, "the reference embeddings")
    if x.shape[1] != y.shape[1]:
        raise UserError(f"embeddings of width {x.shape[1]} and {y.shape[1]} cannot be compared: use one embedder")
    if min(len(x), len(y)) < 2:
        raise UserError(f"a distance needs at least 2 embeddings of each set, got {len(x)} and {len(y)}")
    return x, y


def blocks(rows: Tensor, size: int, title: str) -> Iterable[Tensor]:
    """Split rows into blocks of `size`, with a progress bar if there is more than one."""
    parts = rows.split(size)
    return tqdm(parts, desc=title, unit="block", leave=False, disable=len(parts) < 2)
