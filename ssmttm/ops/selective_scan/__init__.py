"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, algorithm 2; discretised as in its reference code).

For each channel, with a state h [N] that starts at `initial_state` or zero:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] * B[t]        y[t] = h[t] . C[t] + D * x[t]

Shapes: B batch, T positions, D channels, N state; B and C are shared by the channels. x [B, T, D], dt [B, T, D] > 0
(after softplus; where it is 0 the state does not change), A [D, N] < 0, B and C [B, T, N], D [D], state [B, D, N].
Decay and state are float32 whatever the dtype of the input (float64 where the input is); y has the dtype of x.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops import backend
from ssmttm.ops.common import accumulation_dtype, unsupported_dtype
from ssmttm.ops.selective_scan.chunked import LOG2_E, ChunkedSelectiveScan
from ssmttm.ops.selective_scan.naive import check_operands, selective_scan_reference

__all__ = ["selective_scan", "selective_scan_flops", "selective_scan_reference", "selective_scan_step"]

MAX_KERNEL_STATE = 256  # the largest d_state of mamba_ssm's kernel
INSTANT = 2.0**-40  # a dt too small for any decay: exp(INSTANT * A) is 1 in float32


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
    check_operands(x, dt, A, B, C, D, initial_state)
    dtype = accumulation_dtype(x)
    too_large = f"d_state {A.shape[1]}, above {MAX_KERNEL_STATE}" if A.shape[1] > MAX_KERNEL_STATE else ""
    kernel = backend.cuda_kernel("selective_scan", x.device, unsupported_dtype(x) or too_large)
    if kernel is not None:
        return _cuda_scan(kernel, x, dt, A, B, C, D, initial_state)
    dt, A, B, C = dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    D = None if D is None else D.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return ChunkedSelectiveScan.apply(x, dt, A, B, C, D, initial_state, chunk_size)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """One position: x and dt [B, D], B and C [B, N]; returns y [B, D]. `state` [B, D, N] is updated in place."""
    kernel = backend.cuda_kernel("selective_scan_step", x.device, unsupported_dtype(x, state))
    if kernel is not None:
        zeros = dt.new_zeros(x.shape[1])  # it reads the strides of D and dt_bias even if they are None
        D = zeros if D is None else D
        return kernel(state, x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D=D, dt_bias=zeros)
    dtype = state.dtype
    x_, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
    state.mul_(torch.exp2((dt * LOG2_E)[..., None] * A)).addcmul_((dt * x_)[..., None], B[:, None])
    y = torch.bmm(C[:, None], state.mT)[:, 0]  # [B, D]
    return (y if D is None else torch.addcmul(y, x_, D.to(dtype))).to(x.dtype)


def selective_scan_flops(length: int, width: int, d_state: int) -> int:
    """Forward FLOPs of `selective_scan` over one sequence: each multiplication, addition and exponential is one."""
    per_state = 2 + 1 + 2 + 2  # decay, input, recurrence, output
    return length * width * (per_state * d_state + 3)  # and dt * x, + D * x


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
    """mamba_ssm's kernel starts from zero and gives no gradient to its final state.

    So both states pass through it as extra positions: N before the sequence write the columns of the initial state,
    each with dt = INSTANT; N after it, with dt = 0, read the columns of the final state.
    """
    batch, length, _ = x.shape
    n = A.shape[1]
    dtype, columns = x.dtype, torch.eye(n, device=x.device).expand(batch, n, n)
    x, dt, B = F.pad(x.float(), (0, 0, 0, n)), F.pad(dt.float(), (0, 0, 0, n)), F.pad(B.float(), (0, 0, 0, n))
    C = torch.cat([C.float(), columns], 1)
    if initial_state is not None:
        x, B = torch.cat([initial_state.float().mT / INSTANT, x], 1), torch.cat([columns, B], 1)
        dt, C = F.pad(dt, (0, 0, n, 0), value=INSTANT), F.pad(C, (0, 0, n, 0))
    y = kernel(x.mT, dt.mT, A.float(), B.mT, C.mT, D=None if D is None else D.float()).mT
    y, columns = y[:, -length - n :].split([length, n], 1)  # [B, T, D], [B, N, D]
    return y.to(dtype), columns.mT
