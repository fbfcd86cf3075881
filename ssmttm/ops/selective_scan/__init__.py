"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, algorithm 2; discretised as in its reference code).

For each channel, with a state h [N] that starts at `initial_state` or zero:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] * B[t]        y[t] = h[t] . C[t] + D * x[t]

Shapes: B batch, T positions, D channels, N state; B and C are shared by the channels. x [B, T, D], dt [B, T, D] > 0
(after softplus; where it is 0 the state stays as it is), A [D, N] < 0, B and C [B, T, N], D [D], state [B, D, N].
Decay and state are float32 whatever the dtype of the input (float64 where the input is); y has the dtype of x.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops import backend
from ssmttm.ops.selective_scan.chunked import LOG2_E, ChunkedSelectiveScan

INSTANT = 2.0**-40  # a step in time during which no state decays: exp(INSTANT * A) is 1 in float32


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the recurrence above, one position after the other.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [B, D, N] in float32.
    """
    _check(x, dt, A, B, C, D, initial_state)
    dtype, compute = x.dtype, _compute_dtype(x)
    x, dt, A, B, C = (M.to(compute) for M in (x, dt, A, B, C))
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


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """The same function as `selective_scan_reference`, fast.

    Args:
        chunk_size: positions worked on at once. Longer chunks leave fewer states to keep for the backward, until their
            buffers no longer fit into the cache.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [B, D, N] in float32.
    """
    _check(x, dt, A, B, C, D, initial_state)
    wide = _compute_dtype(x)
    kernel = backend.cuda_kernel("selective_scan", x.device)
    if kernel is not None and wide == torch.float32:
        return _cuda_scan(kernel, x, dt, A, B, C, D, initial_state)
    dt, A, B, C = (M.to(wide) for M in (dt, A, B, C))
    D, initial_state = (None if M is None else M.to(wide) for M in (D, initial_state))
    with torch.autocast(x.device.type, enabled=False):
        return ChunkedSelectiveScan.apply(x, dt, A, B, C, D, initial_state, chunk_size)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """One position: x and dt [B, D], B and C [B, N]; returns y [B, D]. `state` [B, D, N] is updated in place."""
    kernel = backend.cuda_kernel("selective_scan_step", x.device)
    if kernel is not None:
        none = dt.new_zeros(x.shape[1])  # it takes the strides of D and dt_bias whether they are there or not
        D = none if D is None else D
        return kernel(state, x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D=D, dt_bias=none)
    wide = state.dtype
    x_, dt, B, C = (M.to(wide) for M in (x, dt, B, C))
    state.mul_(torch.exp2((dt * LOG2_E)[..., None] * A)).addcmul_((dt * x_)[..., None], B[:, None])
    y = torch.bmm(C[:, None], state.mT)[:, 0]  # [B, D]
    return (y if D is None else torch.addcmul(y, x_, D.to(wide))).to(x.dtype)


def selective_scan_flops(length: int, width: int, d_state: int) -> int:
    """Forward FLOPs of `selective_scan` over one sequence: each multiplication, addition and exponential is one."""
    a_state = 2 + 1 + 2 + 2  # decay, inflow, recurrence, output
    return length * width * (a_state * d_state + 3)  # and dt * x, + D * x


def _cuda_scan(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """mamba_ssm's kernel starts from zero, and hands no gradient to the final state it gives.

    So the states go through it as positions. N of them in front of the sequence write the columns of the initial
    state, each within an instant; N behind it, during which no time passes, read the columns of the final state.
    """
    batch, length, _ = x.shape
    n = A.shape[1]
    dtype, columns = x.dtype, torch.eye(n, device=x.device).expand(batch, n, n)
    x, dt, B = (F.pad(M.float(), (0, 0, 0, n)) for M in (x, dt, B))
    C = torch.cat([C.float(), columns], 1)
    if initial_state is not None:
        x, B = torch.cat([initial_state.float().mT / INSTANT, x], 1), torch.cat([columns, B], 1)
        dt, C = F.pad(dt, (0, 0, n, 0), value=INSTANT), F.pad(C, (0, 0, n, 0))
    y = kernel(x.mT, dt.mT, A.float(), B.mT, C.mT, D=None if D is None else D.float()).mT
    y, columns = y[:, -length - n :].split([length, n], 1)  # [B, T, D], [B, N, D]
    return y.to(dtype), columns.mT


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    batch, length, width = x.shape
    n = A.shape[-1]
    if length == 0:
        raise ValueError("T must be at least 1")
    expected = {"dt": (dt, (batch, length, width)), "A": (A, (width, n)), "D": (D, (width,))}
    expected |= {"B": (B, (batch, length, n)), "C": (C, (batch, length, n))}
    expected["initial_state"] = (initial_state, (batch, width, n))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
