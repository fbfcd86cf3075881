"""The scan of Mamba-3 with one input and one output a head (SISO; Lahoti et al., arXiv 2603.15569).

For each head, with a state h [P, N] and angles theta [R] that start at `initial_state` or zero:

    theta[t] = theta[t-1] + dt[t] * rate[t]        k[t] = rotate(B[t], theta[t])      q[t] = rotate(C[t], theta[t])
    h[t] = a[t] * h[t-1] + a[t] * dt[t] * (1 - trap[t]) * x[t-1] k[t-1]^T + dt[t] * trap[t] * x[t] k[t]^T
    y[t] = h[t] q[t] + D * x[t]        with a[t] = exp(dt[t] * A[t])

The input is discretised by a trapezoidal rule: `trap` weighs the interval's end against its start (Proposition 1; with
trap = 1 it is Mamba-2's scan). `rotate` rotates the pairs (2i, 2i + 1), i < R, by theta_i, which equals a state of R
complex numbers with the decays exp(dt * (A - i * rate)) (Proposition 4).

Shapes: B batch, T positions, H heads, P head width, N state (even), R angles (2R <= N, shared by the heads).
x [B, T, H, P], dt > 0, A < 0 and trap in [0, 1] [B, T, H], B and C [B, T, H, N], rate [B, T, R], D [H].
The state is (angle [B, H, R], ssm [B, H, P, N], k [B, H, N], v [B, H, P]): theta in [-pi, pi], h, and the
last k and x. Angles, decays and state are float32 whatever the dtype of the input (float64 where it is); y is as x.

No CUDA kernel is used: those of mamba_ssm for Mamba-3 round every input, and the running angles, to bfloat16. Nor is
`ssd` called: it scales the input by dt as well, and dividing that out again would leave the gradient of A as a
difference of two large numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops.common import accumulation_dtype
from ssmttm.ops.mamba3.naive import State, check_operands, mamba3_reference, start_state, wrap_angle
from ssmttm.ops.ssd import ssd_flops

__all__ = ["State", "mamba3", "mamba3_flops", "mamba3_reference", "mamba3_step"]


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    rate: Tensor,
    D: Tensor | None = None,
    initial_state: State | None = None,
    lengths: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """The same function as `mamba3_reference`, fast: matrix products within chunks, a recurrence over the chunks.

    A position enters h twice, at the end of its own interval and at the start of the next one. Later positions see the
    sum of both, so the trapezoidal rule costs no second scan.

    Args:
        lengths: number of valid leading positions of each row, [B]; the others do not change the state. None means all.
        chunk_size: the longest chunk. Work within chunks grows with it, the number of stored states falls.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the final state in float32.
    """
    check_operands(x, dt, A, B, C, trap, rate, D)
    dtype, compute = x.dtype, accumulation_dtype(x)
    dt, A, trap, rate = dt.to(compute), A.to(compute), trap.to(compute), rate.to(compute)
    if lengths is not None:
        dt = dt.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
    angle, ssm, k, v = start_state(x, B, rate, initial_state)
    turns = (dt[..., None] * rate[:, :, None]).cumsum(1, dtype=torch.float64)  # float32 would lose digits with T
    angles = wrap_angle(angle[:, None] + turns).to(compute)  # [B, T, H, R]
    rotation = _rotation(angles, B.shape[-1])
    key = _rotate(B.to(compute), rotation).to(dtype)  # [B, T, H, N]
    query = _rotate(C.to(compute), rotation).to(dtype)
    end = dt * trap  # [B, T, H], the weights of the two ends of each interval
    start = dt - end
    later = end + F.pad(start[:, 1:], (0, 0, 0, 1))
    ssm = ssm + (start[:, 0, :, None] * v)[..., None] * k[..., None, :]
    with torch.autocast(x.device.type, enabled=False):
        y, ssm = _chunked_scan(x, key, query, dt * A, end, later, ssm, chunk_size)
    if D is not None:
        y = y + D.to(compute)[:, None] * x
    k, v = _last(k, key, lengths), _last(v, x, lengths)
    return y.to(dtype), (angles[:, -1], ssm, k, v)


def mamba3_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    rate: Tensor,
    D: Tensor | None,
    state: State,
) -> Tensor:
    """One position: x [B, H, P], dt, A and trap [B, H], B and C [B, H, N], rate [B, R]; returns y [B, H, P].

    The tensors of `state`, contiguous, are updated in place.
    """
    angle, ssm, k, v = state
    dtype, compute = x.dtype, ssm.dtype
    x, dt, A, trap, rate = x.to(compute), dt.to(compute), A.to(compute), trap.to(compute), rate.to(compute)
    angle.copy_(wrap_angle(angle + dt[..., None] * rate[:, None]))
    rotation = _rotation(angle, B.shape[-1])
    key, query = _rotate(B.to(compute), rotation), _rotate(C.to(compute), rotation)  # [B, H, N]
    decay, end = torch.exp(dt * A), dt * trap
    ssm.mul_(decay[..., None, None])
    ssm.addcmul_(((dt - end) * decay)[..., None, None] * v[..., None], k[..., None, :])
    ssm.addcmul_((end[..., None] * x)[..., None], key[..., None, :])
    k.copy_(key)
    v.copy_(x)
    y = torch.bmm(query.flatten(0, 1)[:, None], ssm.flatten(0, 1).mT).view_as(x)
    return (y if D is None else torch.addcmul(y, x, D.to(compute)[:, None])).to(dtype)


def mamba3_flops(length: int, heads: int, headdim: int, d_state: int, chunk_size: int = 64) -> int:
    """Forward FLOPs of `mamba3` over one sequence: its matrix products, a multiply-add being two."""
    return ssd_flops(length, heads, headdim, heads, d_state, chunk_size)


def _chunked_scan(
    x: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, now: Tensor, later: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y[i] = sum over j <= i of exp(log_decay over (j, i]) * weight * (q[i] k[j]) * x[j], plus the state's part.

    The weight is now[i] for j = i, later[j] for j < i. x [B, T, H, P], k and q [B, T, H, N]; the weights and log_decay
    [B, T, H] are in the dtype of sums, as the state [B, H, P, N].
    """
    length, dtype = x.shape[1], x.dtype
    chunks = math.ceil(length / chunk_size)
    size = math.ceil(length / chunks)  # equal chunks need the least padding
    padding = chunks * size - length

    def split(tensor: Tensor) -> Tensor:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) if padding else tensor
        return tensor.unflatten(1, (chunks, size)).movedim(3, 1).contiguous()

    x, k, q = split(x), split(k), split(q)  # [B, H, c, size, ...]
    log_decay, now, later = split(log_decay), split(now), split(later)  # [B, H, c, size]
    elapsed = log_decay.cumsum(-1)  # from the chunk's start
    total = elapsed[..., -1:]
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu()
    decay = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(future, -torch.inf).exp()
    weights = decay * later[..., None, :] + torch.diag_embed(now)  # [B, H, c, size, size]
    within = (q @ k.mT * weights.to(dtype)) @ x
    inputs = (x * (later * (total - elapsed).exp()).to(dtype)[..., None]).mT @ k  # [B, H, c, P, N]
    starts = []
    for chunk_decay, chunk_input in zip(total.exp()[..., None].unbind(2), inputs.unbind(2), strict=True):
        starts.append(state)
        state = chunk_decay * state + chunk_input
    carried = (q @ torch.stack(starts, 2).to(dtype).mT) * elapsed.exp().to(dtype)[..., None]
    return (within + carried).movedim(1, 3).flatten(1, 2)[:, :length], state


def _rotation(angle: Tensor, n: int) -> Tensor:
    """exp(i * angle), 1 for the pairs that are not rotated: [..., R] -> [..., N/2], complex."""
    angle = F.pad(angle, (0, n // 2 - angle.shape[-1]))
    return torch.complex(angle.cos(), angle.sin())


def _rotate(B: Tensor, rotation: Tensor) -> Tensor:
    """B [..., N] as N/2 complex numbers, times `rotation` [..., N/2]."""
    pairs = torch.view_as_complex(B.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def _last(before: Tensor, sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """The last valid position of a sequence [B, T, ...], or `before` where there is none: [B, ...]."""
    if lengths is None:
        return sequence[:, -1].to(before.dtype)
    rows = torch.arange(len(lengths), device=lengths.device)
    last = sequence[rows, (lengths - 1).clamp(min=0)].to(before.dtype)
    return torch.where((lengths > 0)[:, None, None], last, before)
