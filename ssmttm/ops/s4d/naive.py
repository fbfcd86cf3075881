"""The reference implementation of S4D: sequential, in plain PyTorch. Shapes as in `ssmttm.ops.s4d`."""

from typing import Any

import torch
from torch import Tensor

from ssmttm.ops.common import check_shapes


def s4d_reference(
    x: Tensor, dt: Tensor, A: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssmttm.ops.s4d`, one position after the other.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [B, D, M], complex64.
    """
    check_operands(x, dt, A, C, D, initial_state)
    dtype = x.dtype
    x, dt, A, C, D, state = accumulation_operands(x, dt, A, C, D, initial_state)
    decay, gain = discretise(dt, A)
    state = torch.zeros_like(decay) if state is None else state  # [B, D, M], or [D, M] if it is zero
    outputs = []
    for column in x.unbind(1):
        state = decay * state + gain * column[..., None]  # [B, D, M]
        outputs.append(2 * (C * state).real.sum(-1))
    y = torch.stack(outputs, 1)  # [B, T, D]
    return (y if D is None else y + D * x).to(dtype), state


def discretise(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: exp(dt A) and (exp(dt A) - 1)/A, [D, M], exact for small dt too."""
    exponent = dt[:, None] * A
    return complex_exp(exponent), exponent.expm1() / A


def complex_exp(exponent: Tensor) -> Tensor:
    """The complex exponential; `torch.polar` is ten times faster than `torch.exp` on a CPU."""
    return torch.polar(exponent.real.exp(), exponent.imag)


def accumulation_operands(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The operands in float32 and complex64, or in float64 and complex128."""
    real = torch.promote_types(x.dtype, torch.float32)
    pair = torch.promote_types(real, torch.complex64)
    return tuple(
        None if tensor is None else tensor.to(pair if tensor.is_complex() else real) for tensor in (x, *others)
    )


def check_operands(x: Tensor, dt: Tensor, A: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None) -> None:
    """Raises ValueError for operands whose shapes do not fit together."""
    batch, length, channels = x.shape
    modes = A.shape[-1]
    if length == 0:
        raise ValueError("T must be at least 1")
    check_shapes(
        {
            "dt": (dt, (channels,)),
            "A": (A, (channels, modes)),
            "C": (C, (channels, modes)),
            "D": (D, (channels,)),
            "initial_state": (initial_state, (batch, channels, modes)),
        }
    )
