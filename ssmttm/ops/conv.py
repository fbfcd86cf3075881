"""Causal depthwise 1-D convolution, the short filter before a state-space scan, with an optional SiLU.

y[t] = act(bias + sum_k weight[:, k] * x[t - K + 1 + k]), where positions before the first come from `initial_state`,
or are zero. Shapes: B batch, T positions, C channels, K taps. The state is the last K - 1 inputs, [B, C, K - 1].
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops import backend
from ssmttm.ops.common import check_shapes, unsupported_dtype

Activation = Literal["silu"] | None

_BLOCK = 2**18  # elements of a block of positions: 1 MiB in float32, about the second-level cache of a core


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """The reference, one position after the other; arguments and result as in `causal_conv`."""
    state = _history(x, weight, initial_state).transpose(1, 2)  # [B, C, K-1]
    outputs = []
    for column in x.unbind(1):
        window = torch.cat([state, column[..., None]], -1)  # [B, C, K]
        y = (window.to(weight.dtype) * weight).sum(-1)
        y = y if bias is None else y + bias
        outputs.append(F.silu(y) if activation else y)
        state = window[..., 1:]
    return torch.stack(outputs, 1).to(x.dtype), state


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: Activation = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve a sequence.

    Args:
        x: [B, T, C].
        weight: [C, K].
        bias: [C] or None.
        initial_state: the K - 1 inputs before the first, [B, C, K-1]; None means zeros.
        activation: "silu" or None.
        lengths: valid leading positions of each row, [B]; the final state is the one after them. None: all.

    Returns:
        y [B, T, C] in the dtype of `x`, and the K - 1 last inputs [B, C, K-1] (a view: copy to keep).
    """
    kernel = backend.cuda_kernel("causal_conv", x.device, _unsupported(x, weight) or _unaligned(x))
    history = _history(x, weight, initial_state)  # [B, K-1, C]
    cpu_kernel = backend.cpu_kernel("causal_conv", x, weight, bias, history) if activation else None
    if cpu_kernel is not None and lengths is None:
        past = history.clone(memory_format=torch.contiguous_format)
        return cpu_kernel(x, weight, bias, past), past.transpose(1, 2)
    if kernel is None and lengths is None:
        last = x[:, x.shape[1] - min(x.shape[1], history.shape[1]) :]
        final_state = torch.cat([history[:, last.shape[1] :], last], 1).transpose(1, 2)  # [B, C, K-1]
        return _ShiftedSum.apply(x, history, weight, bias, activation), final_state
    padded = torch.cat([history, x], 1)  # [B, K-1+T, C]
    if lengths is None:
        final_state = padded[:, x.shape[1] :].transpose(1, 2)
    else:
        positions = lengths[:, None] + torch.arange(weight.shape[1] - 1, device=x.device)  # [B, K-1]
        final_state = padded[torch.arange(len(x), device=x.device)[:, None], positions].transpose(1, 2)
    if kernel is not None:
        history, x = padded[:, : -x.shape[1]].transpose(1, 2), padded[:, -x.shape[1] :].transpose(1, 2)  # [B, C, T]
        bias = None if bias is None else bias.to(weight.dtype)
        return kernel(x, weight, bias, initial_states=history, activation=activation).transpose(1, 2), final_state
    if cpu_kernel is not None:
        return cpu_kernel(x, weight, bias, history.clone(memory_format=torch.contiguous_format)), final_state
    return _ShiftedSum.apply(x, history, weight, bias, activation), final_state


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: Activation = None
) -> Tensor:
    """Convolve one position [B, C] and append it to `state` [B, C, K-1], in place. Returns y [B, C].

    A `state` that is a transposed [B, K-1, C] is faster.
    """
    kernel = backend.cuda_kernel("causal_conv_step", x.device, _unsupported(x, weight, state))
    if kernel is not None:
        return _cuda_step(kernel, x, weight, bias, state, activation)
    past = state.transpose(1, 2)  # [B, K-1, C]
    window = torch.cat([past, x[:, None]], 1)  # [B, K, C]
    past.copy_(window[:, 1:])
    y = (window * weight.t()).sum(1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation else y).to(x.dtype)


def _cuda_step(
    kernel: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    activation: Activation,
) -> Tensor:
    """causal_conv1d's kernel takes x and state of one dtype; under autocast they differ."""
    dtype = torch.promote_types(x.dtype, state.dtype)
    common = state.to(dtype)  # itself, if it has that dtype
    y = kernel(x.to(dtype), common, weight, None if bias is None else bias.to(weight.dtype), activation)
    if common is not state:
        state.copy_(common)
    return y.to(x.dtype)


def _unsupported(x: Tensor, weight: Tensor, *others: Tensor) -> str:
    """What causal_conv1d's kernels do not take, in words; "" if they take it. The weight may have another dtype."""
    taps = weight.shape[1]
    return unsupported_dtype(x, weight, *others) or ("" if 2 <= taps <= 4 else f"d_conv {taps}, only 2 to 4")


def _unaligned(x: Tensor) -> str:
    """The kernel for sequences [B, T, C] reads 8 channels at once."""
    return f"{x.shape[2]} channels, no multiple of 8" if x.shape[2] % 8 else ""


def _history(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The inputs before the first position, [B, K-1, C]."""
    batch, _, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        return x.new_zeros(batch, taps - 1, channels)
    check_shapes({"initial_state": (initial_state, (batch, channels, taps - 1))})
    return initial_state.transpose(1, 2).to(x.dtype)


class _ShiftedSum(torch.autograd.Function):
    """The convolution as K shifted multiply-adds: (x [B, T, C], history [B, K-1, C], weight [C, K], bias [C] or None,
    activation) -> [B, T, C].

    On a CPU it runs over blocks of positions that fit into the cache, several times faster than `F.conv1d` with its two
    transposes, forward and backward. What precedes the activation is computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        taps, y = weight.t().contiguous(), x.new_empty(x.shape)  # [K, C], [B, T, C]
        for items, start, stop in _blocks(x):
            before = _convolve(_window(x, history, items, start, stop, taps), taps, bias).to(x.dtype)
            y[items, start:stop] = F.silu(before) if activation else before
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, history.clone(), taps, bias)  # a copy: the state may be updated in place
        ctx.activation = activation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, history, taps, bias = ctx.saved_tensors
        past = len(taps) - 1
        grad_padded = x.new_empty(len(x), past + x.shape[1], x.shape[2])  # of history and x
        grad_taps, grad_bias = torch.zeros_like(taps), None if bias is None else torch.zeros_like(bias)
        overlap = taps.new_zeros(())  # of a block's gradient with the next block, which adds to it
        for items, start, stop in _blocks(x):
            window = _window(x, history, items, start, stop, taps)  # [i, K-1+t, C]
            block = grad[items, start:stop]
            if ctx.activation:
                block = torch.ops.aten.silu_backward(block, _convolve(window, taps, bias).to(x.dtype))
            block = block.to(taps.dtype)
            grad_window = torch.zeros_like(window)
            if start > 0:
                grad_window[:, :past] = overlap
            for k in range(len(taps)):
                grad_window[:, k : k + stop - start].addcmul_(block, taps[k])
                grad_taps[k] += (block * window[:, k : k + stop - start]).sum((0, 1))
            if grad_bias is not None:
                grad_bias += block.sum((0, 1))
            grad_padded[items, start : stop + past] = grad_window
            overlap = grad_window[:, stop - start :]
        return grad_padded[:, past:], grad_padded[:, :past], grad_taps.t(), grad_bias, None


def _blocks(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Items of the batch and positions [start, stop) of x [B, T, C]: parts that fit into a CPU's cache, or all."""
    batch, length, channels = x.shape
    if x.device.type != "cpu":
        yield slice(0, batch), 0, length
        return
    size = max(1, _BLOCK // channels)
    for item in range(batch):
        for start in range(0, length, size):
            yield slice(item, item + 1), start, min(start + size, length)


def _window(x: Tensor, history: Tensor, items: slice, start: int, stop: int, taps: Tensor) -> Tensor:
    """The inputs of the outputs [start, stop), in the dtype of the weight: [i, K-1+t, C]."""
    first = start - len(taps) + 1
    if first >= 0:
        return x[items, first:stop].to(taps.dtype)
    return torch.cat([history[items, first:], x[items, :stop]], 1).to(taps.dtype)


def _convolve(window: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """[i, K-1+t, C] -> [i, t, C]."""
    length = window.shape[1] - len(taps) + 1
    y = window[:, :length] * taps[0] if bias is None else torch.addcmul(bias, window[:, :length], taps[0])
    for k in range(1, len(taps)):
        y.addcmul_(window[:, k : k + length], taps[k])
    return y
