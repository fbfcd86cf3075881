"""State-space duality (SSD), the scan of Mamba-2 (Dao and Gu, arXiv 2405.21060).

For each head, with a state h [P, N] that starts at `initial_state` or zero:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] B[t]^T        y[t] = h[t] C[t] + D * x[t]

Shapes: B batch, T positions, H heads, P head width, G groups (H a multiple of G; the heads of a group share B and C),
N state. x [B, T, H, P], dt [B, T, H] > 0 (after softplus), A [H] < 0, B and C [B, T, G, N], D [H], state [B, H, P, N].
Decay and state are float32 whatever the dtype of the input (float64 where the input is); y has the dtype of x.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmttm.ops import backend
from ssmttm.ops.common import accumulation_dtype, unsupported_dtype
from ssmttm.ops.ssd.chunked import ChunkedSSD
from ssmttm.ops.ssd.naive import check_operands, ssd_reference

__all__ = ["ssd", "ssd_flops", "ssd_reference", "ssd_step"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same function as `ssd_reference`, fast: matrix products within chunks, a recurrence over the chunks.

    Args:
        chunk_size: the longest chunk. Work within chunks grows with it, the number of stored states falls.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the final state [B, H, P, N] in float32.
    """
    check_operands(x, dt, A, B, C, D, initial_state)
    kernel = backend.cuda_kernel("ssd", x.device, unsupported_dtype(x))
    if kernel is not None:
        return _cuda_scan(kernel, x, dt, A, B, C, D, initial_state, chunk_size)
    cpu_kernel = backend.cpu_kernel("ssd", x, dt, A, B, C, D, initial_state)
    if cpu_kernel is not None:
        return cpu_kernel(x, dt, A, B, C, D, initial_state)
    dtype = accumulation_dtype(x)
    dt, A, B, C = dt.to(dtype), A.to(dtype), B.to(x.dtype), C.to(x.dtype)
    D = None if D is None else D.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return ChunkedSSD.apply(x, dt, A, B, C, D, initial_state, chunk_size)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """One position: x [B, H, P], dt [B, H], B and C [B, G, N]; returns y [B, H, P].

    `state` [B, H, P, N], contiguous, is updated in place.
    """
    kernel = backend.cuda_kernel("ssd_step", x.device, unsupported_dtype(x, state))
    if kernel is not None:
        return _cuda_step(kernel, x, dt, A, B, C, D, state)
    batch, heads, width = x.shape
    groups, n = B.shape[1:]
    dtype = state.dtype
    x_, dt = x.to(dtype), dt.to(dtype)
    by_group = state.view(batch, groups, heads // groups, width, n)
    by_group.mul_(torch.exp(dt * A).view(batch, groups, -1, 1, 1))
    by_group.addcmul_((x_ * dt[..., None]).view(batch, groups, -1, width, 1), B.to(dtype)[:, :, None, None])
    y = torch.bmm(C.to(dtype).reshape(-1, 1, n), state.view(batch * groups, -1, n).mT).view(batch, heads, width)
    return (y if D is None else torch.addcmul(y, x_, D.to(dtype)[:, None])).to(x.dtype)


def ssd_flops(length: int, heads: int, headdim: int, groups: int, d_state: int, chunk_size: int = 64) -> int:
    """Forward FLOPs of `ssd` over one sequence: its matrix products, a multiply-add being two."""
    chunks = math.ceil(length / chunk_size)
    q = math.ceil(length / chunks)
    width = heads * headdim
    return 2 * chunks * q * (q * groups * d_state + q * width + 2 * d_state * width)


def _cuda_scan(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """mamba_ssm's kernel keeps the initial state for its backward: it gets a copy, as the caller may overwrite its."""
    initial = None if initial_state is None else initial_state.to(torch.float32, copy=True)
    B, C = B.to(x.dtype), C.to(x.dtype)
    return kernel(x, dt.float(), A.float(), B, C, chunk_size, D=D, initial_states=initial, return_final_states=True)


def _cuda_step(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
) -> Tensor:
    """mamba_ssm's kernel takes every per-head operand expanded over the head's width with stride 0."""
    heads, width, n = state.shape[1:]
    zeros = torch.zeros(heads, device=x.device)  # it reads the strides of D and dt_bias even if they are None
    return kernel(
        state,
        x,
        dt.float()[..., None].expand(-1, -1, width),
        A.float()[:, None, None].expand(heads, width, n),
        B.to(x.dtype),
        C.to(x.dtype),
        D=(zeros if D is None else D)[:, None].expand(heads, width),
        dt_bias=zeros[:, None].expand(heads, width),
        dt_softplus=False,
    )
