"""Cross-entropy of many positions as one autograd function over blocks of rows that fit into the cache.

`log_softmax` of all logits at once takes several times their memory in float32, forward and backward. Here the logits,
in their own dtype, and the log of each softmax's denominator are kept. Sums are float32.
Shapes: R rows, V classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**16  # elements of a block of rows: 256 KiB in float32


def cross_entropy(logits: Tensor, targets: Tensor, n_smoothed: int) -> tuple[Tensor, Tensor, Tensor]:
    """By row: -log p of the target, the mean of -log p over the first `n_smoothed` classes (0: none), and log Z.

    Args:
        logits: [R, V].
        targets: int64 [R].

    Returns:
        float32 [R] each.
    """
    return _CrossEntropy.apply(logits, targets, n_smoothed)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, n_smoothed: int) -> tuple[Tensor, Tensor, Tensor]:
        log_z, chosen, mean = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
        for rows in _blocks(logits):
            block = logits[rows].float()
            chosen[rows] = block.gather(1, targets[rows, None])[:, 0]
            mean[rows] = block[:, :n_smoothed].mean(1) if n_smoothed else 0
            log_z[rows] = block.logsumexp(1)
        ctx.save_for_backward(logits, targets, log_z)
        ctx.n_smoothed = n_smoothed
        return log_z - chosen, log_z - mean, log_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_plain: Tensor, grad_mean: Tensor, grad_log_z: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_z = ctx.saved_tensors
        through_z = grad_plain + grad_mean + grad_log_z
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            grad = (logits[rows].float() - log_z[rows, None]).exp_().mul_(through_z[rows, None])
            if ctx.n_smoothed:
                grad[:, : ctx.n_smoothed] -= (grad_mean[rows] / ctx.n_smoothed)[:, None]
            result[rows] = grad.scatter_add_(1, targets[rows, None], -grad_plain[rows, None])
        return result, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return (slice(start, start + size) for start in range(0, len(logits), size))
