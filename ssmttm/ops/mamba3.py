"""The scan of Mamba-3 with one input and one output a head (SISO; Lahoti et al., arXiv 2603.15569).

For each head, with a state h [P, N] and angles theta [R] that start at `initial_state` or zero:

    theta[t] = theta[t-1] + dt[t] * rate[t]        k[t] = turn(B[t], theta[t])        q[t] = turn(C[t], theta[t])
    h[t] = a[t] * h[t-1] + a[t] * dt[t] * (1 - trap[t]) * x[t-1] k[t-1]^T + dt[t] * trap[t] * x[t] k[t]^T
    y[t] = h[t] q[t] + D * x[t]        with a[t] = exp(dt[t] * A[t])

The input enters by a trapezoidal rule: `trap` weighs the interval's end against its start (Proposition 1; with trap = 1
it is Mamba-2's scan). `turn` rotates the pairs (2i, 2i + 1), i < R, by theta_i, which is what a state of R complex
numbers with the decays exp(dt * (A - i * rate)) comes to (Proposition 4).

Shapes: B batch, T positions, H heads, P head width, N state (even), R angles (2R <= N, shared by the heads).
x [B, T, H, P], dt > 0, A < 0 and trap in [0, 1] [B, T, H], B and C [B, T, H, N], rate [B, T, R], D [H].
The state is (angle [B, H, R], ssm [B, H, P, N], k [B, H, N], v [B, H, P]): theta within half a turn of 0, h, and the
last k and x. Angles, decays and state are float32 whatever the dtype of the input (float64 where it is); y is as x.

There is no CUDA kernel behind it: those of mamba_ssm for Mamba-3 round every input, and the running angles, to bfloat16
whatever they are given. Nor is `ssd` called: it weighs the input by what it multiplies A by, and to divide that out
again would leave the gradient of A as a difference of two large numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops.ssd import ssd_flops

State = tuple[Tensor, Tensor, Tensor, Tensor]


def mamba3_reference(
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
) -> tuple[Tensor, State]:
    """The oracle: the recurrence above, one position after the other; arguments and result as in `mamba3`."""
    _check(x, dt, A, B, C, trap, rate, D)
    dtype, wide = x.dtype, _wide(x)
    x, dt, A, B, C, trap, rate = (M.to(wide) for M in (x, dt, A, B, C, trap, rate))
    angle, ssm, k, v = _start(x, B, rate, initial_state, wide)
    outputs = []
    for t in range(x.shape[1]):
        real = dt.new_ones(len(dt), 1) if lengths is None else (t < lengths)[:, None]  # [B, 1]
        time, real = dt[:, t] * real, real[..., None].bool()
        angle = _wrapped(angle + time[..., None] * rate[:, t, None])
        key, query = _turned(B[:, t], angle), _turned(C[:, t], angle)  # [B, H, N]
        decay, end = torch.exp(time * A[:, t]), time * trap[:, t]
        ssm = ssm + ((time - end)[..., None] * v)[..., None] * k[..., None, :]
        ssm = decay[..., None, None] * ssm + (end[..., None] * x[:, t])[..., None] * key[..., None, :]  # [B, H, P, N]
        outputs.append((ssm * query[..., None, :]).sum(-1))
        k, v = torch.where(real, key, k), torch.where(real, x[:, t], v)
    y = torch.stack(outputs, 1)  # [B, T, H, P]
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    return y.to(dtype), (angle, ssm, k, v)


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

    A position enters h twice, at the end of its own interval and at the start of the next one. What reads it later sees
    the sum of both, so the trapezoidal rule costs no second scan.

    Args:
        lengths: how many leading positions of each row count, [B]; the others leave the state as it is. None means all.
        chunk_size: the longest chunk. Work within chunks grows with it, the number of stored states falls.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the final state in float32.
    """
    _check(x, dt, A, B, C, trap, rate, D)
    dtype, wide = x.dtype, _wide(x)
    dt, A, trap, rate = (M.to(wide) for M in (dt, A, trap, rate))
    if lengths is not None:
        dt = dt.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
    angle, ssm, k, v = _start(x, B, rate, initial_state, wide)
    angles = angle[:, None] + (dt[..., None] * rate[:, :, None]).cumsum(1)  # [B, T, H, R]
    rotation = _rotation(angles, B.shape[-1])
    key, query = (_rotated(M.to(wide), rotation).to(dtype) for M in (B, C))  # [B, T, H, N]
    end = dt * trap  # [B, T, H], the weights of the two ends of each interval
    start = dt - end
    later = end + F.pad(start[:, 1:], (0, 0, 0, 1))
    ssm = ssm + (start[:, 0, :, None] * v)[..., None] * k[..., None, :]
    with torch.autocast(x.device.type, enabled=False):
        y, ssm = _chunked_scan(x, key, query, dt * A, end, later, ssm, chunk_size)
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    k, v = (_last(before, M, lengths) for before, M in ((k, key), (v, x)))
    return y.to(dtype), (_wrapped(angles[:, -1]), ssm, k, v)


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
    dtype, wide = x.dtype, ssm.dtype
    x, dt, A, trap, rate = (M.to(wide) for M in (x, dt, A, trap, rate))
    angle.copy_(_wrapped(angle + dt[..., None] * rate[:, None]))
    rotation = _rotation(angle, B.shape[-1])
    key, query = (_rotated(M.to(wide), rotation) for M in (B, C))  # [B, H, N]
    decay, end = torch.exp(dt * A), dt * trap
    ssm.mul_(decay[..., None, None])
    ssm.addcmul_(((dt - end) * decay)[..., None, None] * v[..., None], k[..., None, :])
    ssm.addcmul_((end[..., None] * x)[..., None], key[..., None, :])
    k.copy_(key)
    v.copy_(x)
    y = torch.bmm(query.flatten(0, 1)[:, None], ssm.flatten(0, 1).mT).view_as(x)
    return (y if D is None else torch.addcmul(y, x, D.to(wide)[:, None])).to(dtype)


def mamba3_flops(length: int, heads: int, headdim: int, d_state: int, chunk_size: int = 64) -> int:
    """Forward FLOPs of `mamba3` over one sequence: its matrix products, a multiply-add being two."""
    return ssd_flops(length, heads, headdim, heads, d_state, chunk_size)


def _chunked_scan(
    x: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, now: Tensor, later: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y[i] = sum over j <= i of exp(log_decay over (j, i]) * weight * (q[i] k[j]) * x[j], and what the state adds.

    The weight is now[i] for j = i, later[j] for j < i. x [B, T, H, P], k and q [B, T, H, N]; the weights and log_decay
    [B, T, H] are in the wide dtype, as the state [B, H, P, N].
    """
    length, dtype = x.shape[1], x.dtype
    chunks = math.ceil(length / chunk_size)
    size = math.ceil(length / chunks)  # equal chunks need the least padding
    padding = chunks * size - length

    def split(M: Tensor) -> Tensor:
        M = F.pad(M, (0, 0) * (M.dim() - 2) + (0, padding)) if padding else M
        return M.unflatten(1, (chunks, size)).movedim(3, 1).contiguous()

    x, k, q, log_decay, now, later = (split(M) for M in (x, k, q, log_decay, now, later))  # [B, H, c, size, ...]
    passed = log_decay.cumsum(-1)  # from the chunk's start
    total = passed[..., -1:]
    ahead = torch.ones(size, size, dtype=torch.bool, device=x.device).triu()
    decay = (passed[..., :, None] - passed[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    weights = decay * later[..., None, :] + torch.diag_embed(now)  # [B, H, c, size, size]
    within = (q @ k.mT * weights.to(dtype)) @ x
    written = (x * (later * (total - passed).exp()).to(dtype)[..., None]).mT @ k  # [B, H, c, P, N]
    starts = []
    for whole, inflow in zip(total.exp()[..., None].unbind(2), written.unbind(2), strict=True):
        starts.append(state)
        state = whole * state + inflow
    before = (q @ torch.stack(starts, 2).to(dtype).mT) * passed.exp().to(dtype)[..., None]
    return (within + before).movedim(1, 3).flatten(1, 2)[:, :length], state


def _start(x: Tensor, B: Tensor, rate: Tensor, state: State | None, wide: torch.dtype) -> State:
    """The given state, or the one before the first position."""
    batch, _, heads, width = x.shape
    n, angles = B.shape[-1], rate.shape[-1]
    shapes = (batch, heads, angles), (batch, heads, width, n), (batch, heads, n), (batch, heads, width)
    if state is None:
        angle, ssm, k, v = (x.new_zeros(shape, dtype=wide) for shape in shapes)
        return angle, ssm, k, v
    for tensor, shape in zip(state, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"a tensor of the state has the shape {tuple(tensor.shape)}, not {shape}")
    angle, ssm, k, v = (tensor.to(wide) for tensor in state)
    return angle, ssm, k, v


def _turned(B: Tensor, angle: Tensor) -> Tensor:
    """B [..., N] with its first pairs turned by `angle` [..., R], written out in real numbers."""
    turning = 2 * angle.shape[-1]
    a, b = B[..., 0:turning:2], B[..., 1:turning:2]
    cos, sin = angle.cos(), angle.sin()
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)  # [..., R, 2]
    return torch.cat([pairs.flatten(-2), B[..., turning:]], -1)


def _rotation(angle: Tensor, n: int) -> Tensor:
    """exp(i * angle), 1 for the pairs that do not turn: [..., R] -> [..., N/2], complex."""
    angle = F.pad(angle, (0, n // 2 - angle.shape[-1]))
    return torch.complex(angle.cos(), angle.sin())


def _rotated(B: Tensor, rotation: Tensor) -> Tensor:
    """B [..., N], its pairs being complex numbers, times `rotation` [..., N/2]."""
    pairs = torch.view_as_complex(B.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def _wrapped(angle: Tensor) -> Tensor:
    """The same direction within half a turn of 0, so that a long sequence costs no precision."""
    return angle - 2 * torch.pi * torch.round(angle / (2 * torch.pi))


def _last(before: Tensor, sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """The last real position of a sequence [B, T, ...], or what came before it: [B, ...], in the dtype of `before`."""
    if lengths is None:
        return sequence[:, -1].to(before.dtype)
    rows = torch.arange(len(lengths), device=lengths.device)
    last = sequence[rows, (lengths - 1).clamp(min=0)].to(before.dtype)
    return torch.where((lengths > 0)[:, None, None], last, before)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, trap: Tensor, rate: Tensor, D: Tensor | None
) -> None:
    batch, length, heads, _ = x.shape
    n, angles = B.shape[-1], rate.shape[-1]
    if length == 0 or n % 2 or 2 * angles > n:
        raise ValueError(f"T must be at least 1, N even and R at most N/2, not T = {length}, N = {n}, R = {angles}")
    by_head = (batch, length, heads)
    expected = {"dt": (dt, by_head), "A": (A, by_head), "trap": (trap, by_head), "D": (D, (heads,))}
    expected |= {"B": (B, (*by_head, n)), "C": (C, (*by_head, n)), "rate": (rate, (batch, length, angles))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
