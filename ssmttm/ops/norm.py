"""RMSNorm(x * silu(z)) for training on a CPU, as one autograd function over blocks of rows that fit into the cache.

As separate operations each step of it passes through the memory, forward and backward, in float32, and keeps its
result. Here x, z and one number a row are kept.
Shapes: R rows, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**16  # elements of a block of rows: 256 KiB in float32


class GatedRMSNormFunction(torch.autograd.Function):
    """(x [R, D], z [R, D], weight [D], eps) -> [R, D] in the dtype of x; sums in that of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=weight.dtype)
        for rows in _blocks(x):
            gated = F.silu(z[rows].to(weight.dtype)).mul_(x[rows])
            scale[rows] = (gated.square().mean(-1, keepdim=True) + eps).rsqrt_()
            result[rows] = gated.mul_(scale[rows]).mul_(weight)
        ctx.save_for_backward(x, z, weight, scale)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, scale = ctx.saved_tensors
        grad_x, grad_z, grad_weight = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(weight)
        for rows in _blocks(x):
            x_, z_ = x[rows].to(weight.dtype), z[rows].to(weight.dtype)
            gate = F.silu(z_)
            normed = (x_ * gate).mul_(scale[rows])
            grad_ = grad[rows].to(weight.dtype)
            grad_weight += (grad_ * normed).sum(0)
            grad_ = grad_ * weight
            grad_ -= normed.mul_((grad_ * normed).mean(-1, keepdim=True))
            grad_ *= scale[rows]  # of x * silu(z)
            grad_x[rows] = gate.mul_(grad_)
            grad_z[rows] = torch.ops.aten.silu_backward(grad_.mul_(x_), z_)
        return grad_x, grad_z, grad_weight, None


def _blocks(x: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + size) for start in range(0, len(x), size))
