"""The reference implementation of Mamba-3's scan: sequential, in plain PyTorch. Shapes as in `ssmttm.ops.mamba3`."""

import torch
from torch import Tensor

from ssmttm.ops.common import accumulation_dtype, check_shapes

_TWO_PI = 6.28125  # 2 pi in 8 bits

State = tuple[Tensor, Tensor, Tensor, Tensor]  # angle, ssm, k, v


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
    """The recurrence of `ssmttm.ops.mamba3`, one position after the other; arguments and result as in `mamba3`."""
    check_operands(x, dt, A, B, C, trap, rate, D)
    dtype, compute = x.dtype, accumulation_dtype(x)
    x, dt, A, B, C = x.to(compute), dt.to(compute), A.to(compute), B.to(compute), C.to(compute)
    trap, rate = trap.to(compute), rate.to(compute)
    angle, ssm, k, v = start_state(x, B, rate, initial_state)
    outputs = []
    for t in range(x.shape[1]):
        valid = dt.new_ones(len(dt), 1) if lengths is None else (t < lengths)[:, None]  # [B, 1]
        dt_t, valid = dt[:, t] * valid, valid[..., None].bool()
        angle = wrap_angle(angle + dt_t[..., None] * rate[:, t, None])
        key, query = _rotate(B[:, t], angle), _rotate(C[:, t], angle)  # [B, H, N]
        decay, end = torch.exp(dt_t * A[:, t]), dt_t * trap[:, t]
        ssm = ssm + ((dt_t - end)[..., None] * v)[..., None] * k[..., None, :]
        ssm = decay[..., None, None] * ssm + (end[..., None] * x[:, t])[..., None] * key[..., None, :]  # [B, H, P, N]
        outputs.append((ssm * query[..., None, :]).sum(-1))
        k, v = torch.where(valid, key, k), torch.where(valid, x[:, t], v)
    y = torch.stack(outputs, 1)  # [B, T, H, P]
    if D is not None:
        y = y + D.to(compute)[:, None] * x
    return y.to(dtype), (angle, ssm, k, v)


def _rotate(B: Tensor, angle: Tensor) -> Tensor:
    """B [..., N] with its first pairs rotated by `angle` [..., R], in real arithmetic."""
    rotated = 2 * angle.shape[-1]
    a, b = B[..., 0:rotated:2], B[..., 1:rotated:2]
    cos, sin = angle.cos(), angle.sin()
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)  # [..., R, 2]
    return torch.cat([pairs.flatten(-2), B[..., rotated:]], -1)


def wrap_angle(angle: Tensor) -> Tensor:
    """The angle in [-pi, pi], so that long sequences lose no precision.

    2 pi is subtracted in two parts, of which multiples of the first are exact (Cody and Waite): rounded to float32, it
    would change the angle by 2e-7 each time.
    """
    revolutions = (angle.detach() / (2 * torch.pi)).round()
    return angle.sub(revolutions, alpha=_TWO_PI).sub(revolutions, alpha=2 * torch.pi - _TWO_PI)


def start_state(x: Tensor, B: Tensor, rate: Tensor, state: State | None) -> State:
    """The given state, or zeros, in the dtype of sums.

    Raises:
        ValueError: a tensor of the state has another shape.
    """
    batch, _, heads, width = x.shape
    n, angles, dtype = B.shape[-1], rate.shape[-1], accumulation_dtype(x)
    shapes = (batch, heads, angles), (batch, heads, width, n), (batch, heads, n), (batch, heads, width)
    if state is None:
        angle, ssm, k, v = (x.new_zeros(shape, dtype=dtype) for shape in shapes)
        return angle, ssm, k, v
    check_shapes(dict(zip(("angle", "ssm", "k", "v"), zip(state, shapes, strict=True), strict=True)))
    angle, ssm, k, v = (tensor.to(dtype) for tensor in state)
    return angle, ssm, k, v


def check_operands(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, trap: Tensor, rate: Tensor, D: Tensor | None
) -> None:
    """Raises ValueError for operands whose shapes do not fit together."""
    batch, length, heads, _ = x.shape
    n, angles = B.shape[-1], rate.shape[-1]
    if length == 0 or n % 2 or 2 * angles > n:
        raise ValueError(f"T must be at least 1, N even and R at most N/2, got T = {length}, N = {n}, R = {angles}")
    by_head = (batch, length, heads)
    check_shapes(
        {
            "dt": (dt, by_head),
            "A": (A, by_head),
            "B": (B, (*by_head, n)),
            "C": (C, (*by_head, n)),
            "trap": (trap, by_head),
            "rate": (rate, (batch, length, angles)),
            "D": (D, (heads,)),
        }
    )
