"""The reference implementation of SSD: sequential, in plain PyTorch. Shapes as in `ssmttm.ops.ssd`."""

import torch
from torch import Tensor

from ssmttm.ops.common import accumulation_dtype, check_shapes


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssmttm.ops.ssd`, one position after the other.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the final state [B, H, P, N] in float32.
    """
    check_operands(x, dt, A, B, C, D, initial_state)
    dtype, compute = x.dtype, accumulation_dtype(x)
    x, dt, A = x.to(compute), dt.to(compute), A.to(compute)
    heads_per_group = x.shape[2] // B.shape[2]
    B = B.to(compute).repeat_interleave(heads_per_group, 2)  # [B, T, H, N]
    C = C.to(compute).repeat_interleave(heads_per_group, 2)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(compute)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)  # [B, H]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]  # [B, H, P, N]
        state = decay[..., None, None] * state + update
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)  # [B, T, H, P]
    if D is not None:
        y = y + D.to(compute)[:, None] * x
    return y.to(dtype), state


def check_operands(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    """Raises ValueError for operands whose shapes do not fit together."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    if length == 0 or heads % groups:
        raise ValueError(f"T must be at least 1 and H a multiple of G, got T = {length}, H = {heads}, G = {groups}")
    check_shapes(
        {
            "dt": (dt, (batch, length, heads)),
            "A": (A, (heads,)),
            "B": (B, (batch, length, groups, n)),
            "C": (C, (batch, length, groups, n)),
            "D": (D, (heads,)),
            "initial_state": (initial_state, (batch, heads, width, n)),
        }
    )
