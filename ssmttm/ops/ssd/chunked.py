"""The portable chunked SSD as one autograd function, with a backward written by hand.

A sequence is cut into chunks of equal length q. Within a chunk the scan is a masked matrix product; between chunks only
the state is carried (arXiv 2405.21060, section 6). Letters as in `ssmttm.ops.ssd`, and c chunks, r = H/G * P columns a
group. The products that touch the state run over all r columns at once, in the layout in which x arrives, and C B^T is
made once a group. The backward computes the decays again. On a CPU the heads are taken in parts where the states
between the chunks are large (with a large N they have many times the size of x); the backward then computes these
again too.

The decay over (j, i] is exp(s_i - s_j), s the running sum of dt * A in a chunk. For j > i the difference is positive,
and can be large: it is clamped before the exponential and masked after it, so neither value nor gradient overflows.

Tensors as large as x, and the operands of matrix products, have the dtype of x; decays, carried states and sums are
float32 (float64 if x is). The gradient of the decays is a sum of terms, never a difference of two products: with
bfloat16 operands the two would not cancel.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STATES = 2**22  # elements of the states between chunks that are in memory at a time, on a CPU


class ChunkedSSD(torch.autograd.Function):
    """(x, dt, A, B, C, D, initial_state, chunk_size) -> (y, final_state).

    x, B and C are of one dtype, that of y; the others are float32, or float64 if x is.
    """

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
        operands = x, dt, A, B, C, D, initial_state
        forward = _training_forward if any(ctx.needs_input_grad) else _forward
        parts = [forward(*part.take(*operands), chunk_size) for part in _parts(x, B, chunk_size)]
        if any(ctx.needs_input_grad):
            if initial_state is not None:
                initial_state = initial_state.clone()  # the caller may update it in place
            starts = parts[0][2] if len(parts) == 1 else None
            ctx.save_for_backward(*operands[:-1], initial_state, starts)
        ctx.chunk_size = chunk_size
        return _cat([y for y, _, _ in parts], 2), _cat([state for _, state, _ in parts], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *operands, starts = ctx.saved_tensors
        x, _, _, B, _, D, initial_state = operands
        grads = []
        with torch.autocast(grad_y.device.type, enabled=False):
            for part in _parts(x, B, ctx.chunk_size):
                own_grad = grad_y[:, :, part.heads], grad_final[:, part.heads]
                grads.append(_backward(*part.take(*operands), starts, ctx.chunk_size, *own_grad))
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_initial = zip(*grads, strict=True)
        shared = B.shape[2] == 1  # by the heads of all parts
        return (
            _cat(grad_x, 2),
            _cat(grad_dt, 2),
            _cat(grad_A, 0),
            _sum(grad_B, B.dtype) if shared else _cat(grad_B, 2),
            _sum(grad_C, B.dtype) if shared else _cat(grad_C, 2),
            None if D is None else _cat(grad_D, 0),
            None if initial_state is None else _cat(grad_initial, 1),
            None,
        )


class _Part(NamedTuple):
    """Some of the heads, and their groups."""

    heads: slice
    groups: slice

    def take(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The operands of these heads."""
        D = None if D is None else D[self.heads]
        initial_state = None if initial_state is None else initial_state[:, self.heads]
        B, C = B[:, :, self.groups], C[:, :, self.groups]
        return x[:, :, self.heads], dt[:, :, self.heads], A[self.heads], B, C, D, initial_state


def _parts(x: Tensor, B: Tensor, chunk_size: int) -> list[_Part]:
    """The heads in parts whose states between chunks have at most `_STATES` elements, on a CPU; else one part."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    unit = 1 if groups == 1 else heads // groups  # heads that cannot be separated
    size = batch * math.ceil(length / chunk_size) * n * unit * width
    units = max(1, _STATES // size) if x.device.type == "cpu" else heads
    parts = []
    for first in range(0, heads // unit, units):
        last = min(first + units, heads // unit)
        parts.append(_Part(slice(first * unit, last * unit), slice(None) if groups == 1 else slice(first, last)))
    return parts


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _sum(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Summed in float32, or float64."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack(list(tensors)).sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before the chunks."""
    s = _Chunked(x, dt, A, B, C, chunk_size)
    starts, final = _starts(s, initial)
    y = s.by_position(s.C @ starts)  # [b, c, q, h, p]
    y *= s.as_x(s.from_start)
    y += s.positions_of(torch.bmm((s.decay() * s.scores()).flatten(0, 3), s.by_head(s.x, s.dt)))
    if D is not None:
        y.addcmul_(s.x, s.as_x(D))
    return s.join(y), s.state_out(final), starts


def _starts(s: "_Chunked", initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [b, c, G, n, r], and the final one."""
    return _carry(s.B.mT @ s.chunk_inputs(), s.chunk_decay, None if initial is None else s.state_in(initial))


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    grad_y: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of all operands but `chunk_size`. The states between chunks are computed again unless given."""
    s = _Chunked(x, dt, A, B, C, chunk_size)
    if starts is None:
        starts, _ = _starts(s, initial)
    grad_y = s.split(grad_y)  # [b, c, q, h, p]

    # Between chunks: the gradient of the state at each chunk's end, carried from the last chunk to the first.
    read = s.by_group(grad_y * s.as_x(s.from_start))  # [b, c, G, q, r]
    ends, grad_initial = _carry(s.C.mT @ read, s.chunk_decay, s.state_in(grad_final), backwards=True)  # [b, c, G, n, r]
    grad_C = read @ starts.mT  # [b, c, G, q, n]
    grad_B = s.chunk_inputs() @ ends.mT
    grad_xdt = s.by_position(s.B @ ends) * s.as_x(s.to_end)  # [b, c, q, h, p], the gradient of dt * x
    inputs = s.dt * s.sum(grad_xdt * s.x)  # [b, c, q, h], what positions add to the state after the chunk
    outputs = s.from_start * s.sum(grad_y * s.by_position(s.C @ starts))  # what they read from before it
    through = (ends * starts).sum(3, keepdim=True, dtype=dt.dtype) * s.chunk_decay  # [b, c, G, 1, r]
    carried = s.sum_by_head(through)  # [b, c, 1, h]

    # Within chunks.
    grad_y_heads = s.by_head(grad_y)  # [bch, q, p]
    decay, scores = s.decay(), s.scores()  # [b, c, G, h/G, q, q], [b, c, G, 1, q, q]
    grad_mixing = torch.bmm(grad_y_heads, s.by_head(s.x, s.dt).mT).view(decay.shape).mul_(decay)
    grad_scores = grad_mixing.sum(3).tril_()  # [b, c, G, q, q]
    grad_C += grad_scores @ s.B
    grad_B += grad_scores.mT @ s.C
    grad_mixing *= scores
    within = (s.sum(grad_mixing) - s.sum(grad_mixing, -2)).flatten(2, 3).transpose(2, 3)  # [b, c, q, h]
    grad_xdt += s.positions_of(torch.bmm(decay.mul_(scores).flatten(0, 3).mT, grad_y_heads))

    # The decay at position k scales what is read from k on, what was written before k, and what carried through.
    later = within + outputs
    earlier = F.pad(inputs[:, :, :-1].cumsum(2), (0, 0, 1, 0))
    grad_log_decay = later.flip(2).cumsum(2).flip(2) + earlier + carried  # exact where later positions have no gradient
    grad_dt = s.sum(grad_xdt * s.x) + grad_log_decay * A
    grad_x = grad_xdt * s.as_x(s.dt)
    if D is not None:
        grad_x.addcmul_(grad_y, s.as_x(D))
    return (
        s.join(grad_x),
        s.join(grad_dt),
        (grad_log_decay * s.dt).sum((0, 1, 2)),
        s.join(grad_B.transpose(2, 3)),
        s.join(grad_C.transpose(2, 3)),
        None if D is None else s.sum(grad_y * s.x, (0, 1, 2, 4)),
        None if initial is None else s.state_out(grad_initial),
    )


_training_forward = _forward  # of a sequence with gradients; `ssmttm.training.recompute` may compile both halves


def _carry(inputs: Tensor, decay: Tensor, initial: Tensor | None, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: inputs [b, c, G, n, r], decay [b, c, G, 1, r], initial [b, G, n, r].

    Returns the state before each chunk [b, c, G, n, r], in the dtype of `inputs`, and the final state
    [b, G, n, r], in that of `decay`, in which it is carried. `backwards` runs from the last chunk to the first.
    """
    state = torch.zeros_like(inputs[:, 0], dtype=decay.dtype)
    if initial is not None:
        state.copy_(initial)
    before = torch.empty_like(inputs)
    for i in range(inputs.shape[1])[:: -1 if backwards else 1]:
        before[:, i] = state
        state.mul_(decay[:, i]).add_(inputs[:, i])
    return before, state


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
        chunk_decay = total.exp().view(self.batch, self.chunks, self.groups, 1, -1)  # [b, c, G, 1, h/G]
        self.chunk_decay = chunk_decay.repeat_interleave(self.width, -1)  # [b, c, G, 1, r]

    def split(self, tensor: Tensor) -> Tensor:
        """[b, T, ...] -> [b, c, q, ...], zero-padded: dt = 0 leaves the state unchanged."""
        padding = self.chunks * self.q - self.length
        if padding:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
        return tensor.unflatten(1, (self.chunks, self.q))

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `split`."""
        return tensor.flatten(1, 2)[:, : self.length]

    def as_x(self, scale: Tensor) -> Tensor:
        """[..., h] -> [..., h, 1] in the dtype of x, to multiply [b, c, q, h, p] with."""
        return scale[..., None].to(self.x.dtype)

    def sum(self, tensor: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
        """A sum in the dtype of dt, not rounded to that of x."""
        return tensor.sum(dim, dtype=self.dt.dtype)

    def chunk_inputs(self) -> Tensor:
        """What each position adds to the state at its chunk's end, before the product with B: [b, c, G, q, r]."""
        return self.by_group(self.x * self.as_x(self.dt * self.to_end))

    def by_group(self, tensor: Tensor) -> Tensor:
        """[b, c, q, h, p] -> [b, c, G, q, r]."""
        return tensor.reshape(self.batch, self.chunks, self.q, self.groups, -1).transpose(2, 3)

    def by_position(self, tensor: Tensor) -> Tensor:
        """[b, c, G, q, r] -> [b, c, q, h, p], the inverse of `by_group`."""
        return tensor.transpose(2, 3).reshape(self.batch, self.chunks, self.q, self.heads, self.width)

    def by_head(self, tensor: Tensor, scale: Tensor | None = None) -> Tensor:
        """[b, c, q, h, p], scaled by [b, c, q, h] -> [bch, q, p], contiguous for the batched product."""
        tensor = tensor.transpose(2, 3)
        if torch.compiler.is_compiling():  # the product and the copy become one
            return (tensor if scale is None else tensor * self.as_x(scale).transpose(2, 3)).contiguous().flatten(0, 2)
        result = tensor.new_empty(tensor.shape)
        if scale is None:
            result.copy_(tensor)
        else:
            torch.mul(tensor, self.as_x(scale).transpose(2, 3), out=result)
        return result.flatten(0, 2)

    def positions_of(self, by_head: Tensor) -> Tensor:
        """[bch, q, p] -> [b, c, q, h, p], a view."""
        return by_head.view(self.batch, self.chunks, self.heads, self.q, self.width).transpose(2, 3)

    def decay(self) -> Tensor:
        """exp(s_i - s_j) on and below the diagonal, 1 above it, [b, c, G, h/G, q, q]."""
        running = self.log_decay.transpose(2, 3).unflatten(2, (self.groups, -1)).contiguous()  # [b, c, G, h/G, q]
        return (running[..., :, None] - running[..., None, :]).clamp_max_(0).exp_().to(self.x.dtype)

    def scores(self) -> Tensor:
        """C B^T on and below the diagonal, 0 above it, [b, c, G, 1, q, q]: times the decay, the weight of j in i."""
        return (self.C @ self.B.mT).tril_()[:, :, :, None]

    def sum_by_head(self, state: Tensor) -> Tensor:
        """[b, c, G, 1, r] -> [b, c, 1, h]."""
        return state.view(self.batch, self.chunks, 1, self.heads, self.width).sum(-1)

    def state_in(self, state: Tensor) -> Tensor:
        """[b, h, p, n] -> [b, G, n, r]."""
        return state.reshape(self.batch, self.groups, -1, state.shape[-1]).mT

    def state_out(self, state: Tensor) -> Tensor:
        """[b, G, n, r] -> [b, h, p, n]."""
        return state.mT.reshape(self.batch, self.heads, self.width, -1)
