"""The portable selective scan as one autograd function, with a backward written by hand.

The decays differ from state to state, so there is no matrix product in it: all is arithmetic on tensors [N, D] for each
position. A sequence is cut into chunks of q positions. Everything but the recurrence is computed for a whole chunk, in
buffers that stay in the cache; the recurrence itself is one multiply-add a position. The states are laid out as
[b, q, n, d], as the channels d are many and the states n of a channel few. The backward keeps the state before
each chunk and recomputes the others and the decays: for q = n that is as much memory as x.

Every decay is 2 to a power that is never positive, so nothing overflows; 2^(dt A log2 e) and not exp(dt A), since
PyTorch's exp may call a library that is several times slower.
"""

import math
from typing import Any

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)


class ChunkedSelectiveScan(torch.autograd.Function):
    """(x, dt, A, B, C, D, initial_state, chunk_size) -> (y, final_state).

    y has the dtype of x; all others are float32, or float64 if x is.
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
        A_t = A.t().contiguous()  # [n, d]
        state = dt.new_zeros(len(x), *A_t.shape)  # [b, n, d]
        if initial_state is not None:
            state.copy_(initial_state.mT)
        y, starts = torch.empty_like(dt), []
        buffers = _buffers(2, dt, A, chunk_size)
        for chunk in _chunks(dt, chunk_size):
            _, states = _run(buffers, x[:, chunk], dt[:, chunk], A_t, B[:, chunk], state)
            starts.append(state)
            state = states[:, -1].clone()
            y[:, chunk] = (C[:, chunk, None] @ states)[:, :, 0]
        if D is not None:
            y.addcmul_(x, D)
        ctx.save_for_backward(x, dt, A, B, C, D, *starts)
        ctx.chunk_size, ctx.has_initial = chunk_size, initial_state is not None
        return y.to(x.dtype), state.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y, grad_final)


def _backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, *starts = ctx.saved_tensors
    A_t, grad_y = A.t().contiguous(), grad_y.to(dt.dtype)  # [n, d], [b, T, d]
    grad_A, grad_B, grad_C = torch.zeros_like(A_t), torch.empty_like(B), torch.empty_like(C)
    grad_dt, grad_input = torch.empty_like(dt), torch.empty_like(dt)  # the input term is dt * x
    carried = grad_final.mT.contiguous()  # [b, n, d], the gradient of the state after a chunk
    *buffers, product_buffer, grad_buffer = _buffers(4, dt, A, ctx.chunk_size)
    for chunk, start in reversed([*zip(_chunks(dt, ctx.chunk_size), starts, strict=True)]):
        dt_c, grad_y_c = dt[:, chunk, None], grad_y[:, chunk, None]  # [b, q, 1, d]
        decay, states = _run(buffers, x[:, chunk], dt[:, chunk], A_t, B[:, chunk], start)
        product, grads = product_buffer[:, : decay.shape[1]], grad_buffer[:, : decay.shape[1]]  # [b, q, n, d]
        grad_C[:, chunk] = torch.mul(states, grad_y_c, out=product).sum(-1)

        # The gradient of each state: that of its position's output plus, decayed, that of the next state.
        torch.mul(C[:, chunk, :, None], grad_y_c, out=grads)
        grads[:, -1] += carried
        each, decays = grads.unbind(1), decay.unbind(1)
        for t in range(len(each) - 1, 0, -1):
            each[t - 1].addcmul_(decays[t], each[t])
        grad_B[:, chunk] = torch.mul(grads, dt_c * x[:, chunk, None], out=product).sum(-1)
        grad_input[:, chunk] = (B[:, chunk, None] @ grads)[:, :, 0]

        # Through the decay: to the state before each position, and to the exponent dt * A.
        grads *= decay
        carried = grads[:, 0].clone()
        grads[:, 0] *= start
        grads[:, 1:] *= states[:, :-1]
        grad_A += torch.mul(grads, dt_c, out=product).sum((0, 1))
        grad_dt[:, chunk] = grads.mul_(A_t).sum(2)
    grad_dt.addcmul_(grad_input, x)
    grad_x = grad_input.mul_(dt)
    if D is not None:
        grad_x.addcmul_(grad_y, D)
    return (
        grad_x.to(x.dtype),
        grad_dt,
        grad_A.t(),
        grad_B,
        grad_C,
        None if D is None else (grad_y * x).sum((0, 1)),
        carried.mT if ctx.has_initial else None,
        None,
    )


def _run(buffers: list[Tensor], x: Tensor, dt: Tensor, A_t: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's decay and the state after it, both [b, q, n, d], from the state before the chunk."""
    decay, states = buffers[0][:, : dt.shape[1]], buffers[1][:, : dt.shape[1]]
    torch.mul((dt * LOG2_E)[:, :, None], A_t, out=decay).exp2_()
    torch.mul((dt * x)[:, :, None], B[..., None], out=states)  # the input terms
    state = start
    for decay_t, input_t in zip(decay.unbind(1), states.unbind(1), strict=True):
        state = input_t.addcmul_(decay_t, state)
    return decay, states


def _chunks(dt: Tensor, chunk_size: int) -> list[slice]:
    return [slice(first, first + chunk_size) for first in range(0, dt.shape[1], chunk_size)]


def _buffers(count: int, dt: Tensor, A: Tensor, chunk_size: int) -> list[Tensor]:
    """`count` tensors [b, q, n, d], reused for every chunk: allocating them anew would cost more than the work."""
    batch, length, width = dt.shape
    return [*dt.new_empty(count, batch, min(chunk_size, length), A.shape[1], width)]
