"""The linear layer of a decoding step: few rows, so its cost is reading the weight.

With 2 to 4 rows of float32 on a CPU, W x^T takes half the time of `F.linear` on one thread and a third on two (measured
with weights larger than the cache). More rows run in blocks of 4, so that a row's result has the same bits in a batch
of 4, 8 or 12. One row and bfloat16 are fastest with `F.linear`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as `F.linear`: x [..., I], weight [O, I], bias [O] -> [..., O]. Where gradients are
    recorded, it is `F.linear` itself."""
    if torch.compiler.is_compiling() or x.ndim != 2 or len(x) == 1 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    y = torch.cat([torch.mm(weight, rows.t()).t() for rows in x.split(BLOCK)])  # [B, O]
    return y if bias is None else y.add_(bias)


class Linear(nn.Linear):
    """`nn.Linear`, faster in a decoding step."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
