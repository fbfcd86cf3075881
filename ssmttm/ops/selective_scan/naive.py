"""The reference implementation of the selective scan: sequential, in plain PyTorch. Shapes as in its package."""

import torch
from torch import Tensor

from ssmttm.ops.common import accumulation_dtype, check_shapes


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssmttm.ops.selective_scan`, one position after the other.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [B, D, N] in float32.
    """
    check_operands(x, dt, A, B, C, D, initial_state)
    dtype, compute = x.dtype, accumulation_dtype(x)
    x, dt, A, B, C = x.to(compute), dt.to(compute), A.to(compute), B.to(compute), C.to(compute)
    state = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.to(compute)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)  # [B, D, N]
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1)  # [B, T, D]
    if D is not None:
        y = y + D.to(compute) * x
    return y.to(dtype), state


def check_operands(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    """Raises ValueError for operands whose shapes do not fit together."""
    batch, length, width = x.shape
    n = A.shape[-1]
    if length == 0:
        raise ValueError("T must be at least 1")
    check_shapes(
        {
            "dt": (dt, (batch, length, width)),
            "A": (A, (width, n)),
            "B": (B, (batch, length, n)),
            "C": (C, (batch, length, n)),
            "D": (D, (width,)),
            "initial_state": (initial_state, (batch, width, n)),
        }
    )
