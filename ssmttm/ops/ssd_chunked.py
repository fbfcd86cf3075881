"""The portable chunked SSD as one autograd function, with a backward written by hand.

A sequence is cut into chunks of equal length q. Within a chunk the scan is a masked matrix product; between chunks only
the state is carried (arXiv 2405.21060, section 6). Letters as in `ssmttm.ops.ssd`, and c chunks, r = H/G * P columns a
group. The products that touch the state run over all r columns at once, in the layout in which x arrives, and C B^T is
made once a group. The backward keeps the states between the chunks and makes the decays anew.

The decay over (j, i] is exp(s_i - s_j), s the running sum of dt * A in a chunk. The difference is masked to -inf before
the exponential: exp(s_i) * exp(-s_j) would overflow, and a mask after it would send NaN into the gradient.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkedSSD(torch.autograd.Function):
    """(x, dt, A, B, C, D, initial_state, chunk_size) -> (y, final_state); all tensors of one floating dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        s = _Chunked(x, dt, A, B, C, chunk_size)
        inflow = s.B.transpose(-1, -2) @ s.by_group(s.x * (s.dt * s.to_end)[..., None])  # [b, c, G, n, r]
        starts, final = _carry(inflow, s.whole, None if initial_state is None else s.state_in(initial_state))
        y = s.by_position(s.C @ starts)  # [b, c, q, h, p]
        y.mul_(s.from_start[..., None])
        y += s.positions_of(torch.bmm(s.mixing(s.decay()), s.by_head(s.x, s.dt)))
        if D is not None:
            y.addcmul_(s.x, D[:, None])
        y = s.join(y)
        ctx.save_for_backward(x, dt, A, B, C, D, y, starts, final)
        ctx.chunk_size, ctx.has_initial = chunk_size, initial_state is not None
        return y, s.state_out(final)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y, grad_final)


def _backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, y, starts, final = ctx.saved_tensors
    s = _Chunked(x, dt, A, B, C, ctx.chunk_size)
    grad_y = s.split(grad_y)  # [b, c, q, h, p]

    # Between chunks: the gradient of the state at each chunk's end, carried from the last chunk to the first.
    out = s.by_group(grad_y * s.from_start[..., None])  # [b, c, G, q, r]
    reads = s.C.transpose(-1, -2) @ out  # [b, c, G, n, r]
    grad_ends, grad_initial = _carry(reads.flip(1), s.whole.flip(1), s.state_in(grad_final))
    grad_ends = grad_ends.flip(1)
    grad_C = out @ starts.transpose(-1, -2)  # [b, c, G, q, n]
    grad_B = s.by_group(s.x * (s.dt * s.to_end)[..., None]) @ grad_ends.transpose(-1, -2)
    grad_xdt = s.by_position(s.B @ grad_ends).mul_(s.to_end[..., None])  # [b, c, q, h, p], the gradient of dt * x

    # Within chunks.
    decay = s.decay()  # [b, c, h, q, q]
    grad_y_heads = s.by_head(grad_y)  # [bch, q, p]
    grad_mixing = torch.bmm(grad_y_heads, s.by_head(s.x, s.dt).transpose(-1, -2)).view_as(decay)
    grad_scores = s.sum_over_group(grad_mixing.mul_(decay))  # [b, c, G, q, q]
    grad_C += grad_scores @ s.B
    grad_B += grad_scores.transpose(-1, -2) @ s.C
    grad_xdt += s.positions_of(torch.bmm(s.mixing(decay).transpose(-1, -2), grad_y_heads))

    # exp(s_i) scales what position i reads and exp(-s_i) what it writes; the last one scales the state too.
    grad_y_x = (grad_y * s.x).sum(-1)  # [b, c, q, h]
    grad_dt = (grad_xdt * s.x).sum(-1)
    grad_s = (grad_y * s.split(y)).sum(-1) - s.dt * grad_dt
    if D is not None:
        grad_s -= D * grad_y_x
    ends = torch.cat([starts[:, 1:], final[:, None]], 1)
    grad_s[:, :, -1] += s.sum_over_state(grad_ends * ends)
    grad_log_decay = grad_s.sum(2, keepdim=True) - grad_s.cumsum(2) + grad_s  # the sum over q, from each position on
    grad_dt += grad_log_decay * A
    grad_x = grad_xdt * s.dt[..., None]
    if D is not None:
        grad_x.addcmul_(grad_y, D[:, None])
    return (
        s.join(grad_x),
        s.join(grad_dt),
        (grad_log_decay * s.dt).sum((0, 1, 2)),
        s.join(grad_B.transpose(2, 3)),
        s.join(grad_C.transpose(2, 3)),
        None if D is None else grad_y_x.sum((0, 1, 2)),
        s.state_out(grad_initial) if ctx.has_initial else None,
        None,
    )


def _carry(inflow: Tensor, decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: inflow [b, c, G, n, r], decay [b, c, G, 1, r], initial [b, G, n, r].

    Returns the state before each chunk [b, c, G, n, r] and the one after the last [b, G, n, r].
    """
    before = torch.empty_like(inflow)
    before[:, 0] = 0 if initial is None else initial
    for i in range(inflow.shape[1] - 1):
        torch.addcmul(inflow[:, i], before[:, i], decay[:, i], out=before[:, i + 1])
    return before, torch.addcmul(inflow[:, -1], before[:, -1], decay[:, -1])


class _Chunked:
    """A sequence cut into chunks, its decays, and the views of it that the products need."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> None:
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups = B.shape[2]
        self.chunks = math.ceil(self.length / chunk_size)
        self.q = math.ceil(self.length / self.chunks)  # equal chunks need the least padding
        self.x, self.dt = self.split(x), self.split(dt)
        self.B, self.C = self.split(B).transpose(2, 3), self.split(C).transpose(2, 3)  # [b, c, G, q, n]
        self.log_decay = (self.dt * A).cumsum(2)  # [b, c, q, h], never positive
        total = self.log_decay[:, :, -1:]
        self.from_start, self.to_end = self.log_decay.exp(), (total - self.log_decay).exp()  # [b, c, q, h]
        whole = total.exp().view(self.batch, self.chunks, self.groups, 1, -1)  # [b, c, G, 1, h/G]
        self.whole = whole.repeat_interleave(self.width, -1)  # [b, c, G, 1, r]

    def split(self, tensor: Tensor) -> Tensor:
        """[b, T, ...] -> [b, c, q, ...], zeros behind the end: with dt = 0 they leave the state as it is."""
        padding = self.chunks * self.q - self.length
        if padding:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
        return tensor.unflatten(1, (self.chunks, self.q))

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `split`."""
        return tensor.flatten(1, 2)[:, : self.length]

    def by_group(self, tensor: Tensor) -> Tensor:
        """[b, c, q, h, p] -> [b, c, G, q, r]."""
        return tensor.reshape(self.batch, self.chunks, self.q, self.groups, -1).transpose(2, 3)

    def by_position(self, tensor: Tensor) -> Tensor:
        """[b, c, G, q, r] -> [b, c, q, h, p], the inverse of `by_group`."""
        return tensor.transpose(2, 3).reshape(self.batch, self.chunks, self.q, self.heads, self.width)

    def by_head(self, tensor: Tensor, scale: Tensor | None = None) -> Tensor:
        """[b, c, q, h, p], scaled by [b, c, q, h] -> [bch, q, p], contiguous for the batched product."""
        tensor = tensor.transpose(2, 3)
        result = tensor.new_empty(tensor.shape)
        if scale is None:
            result.copy_(tensor)
        else:
            torch.mul(tensor, scale.transpose(2, 3)[..., None], out=result)
        return result.flatten(0, 2)

    def positions_of(self, by_head: Tensor) -> Tensor:
        """[bch, q, p] -> [b, c, q, h, p], a view."""
        return by_head.view(self.batch, self.chunks, self.heads, self.q, self.width).transpose(2, 3)

    def decay(self) -> Tensor:
        """exp(s_i - s_j) on and below the diagonal, 0 above it, [b, c, h, q, q]."""
        running = self.log_decay.transpose(2, 3).contiguous()  # [b, c, h, q]
        future = torch.ones(self.q, self.q, dtype=torch.bool, device=running.device).triu_(1)
        return (running[..., :, None] - running[..., None, :]).masked_fill_(future, -torch.inf).exp_()

    def mixing(self, decay: Tensor) -> Tensor:
        """decay * (C B^T), in place of `decay` -> [bch, q, q]: what position i takes from the dt * x of position j."""
        scores = self.C @ self.B.transpose(-1, -2)  # [b, c, G, q, q]
        decay.unflatten(2, (self.groups, -1)).mul_(scores[:, :, :, None])
        return decay.flatten(0, 2)

    def sum_over_group(self, by_head: Tensor) -> Tensor:
        """[b, c, h, q, q] -> [b, c, G, q, q]."""
        return by_head.unflatten(2, (self.groups, -1)).sum(3)

    def sum_over_state(self, state: Tensor) -> Tensor:
        """[b, c, G, n, r] -> [b, c, h]."""
        return state.sum(3).view(self.batch, self.chunks, self.heads, self.width).sum(-1)

    def state_in(self, state: Tensor) -> Tensor:
        """[b, h, p, n] -> [b, G, n, r]."""
        return state.reshape(self.batch, self.groups, -1, state.shape[-1]).transpose(-1, -2)

    def state_out(self, state: Tensor) -> Tensor:
        """[b, G, n, r] -> [b, h, p, n]."""
        return state.transpose(-1, -2).reshape(self.batch, self.heads, self.width, -1)
