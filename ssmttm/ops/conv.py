"""Causal depthwise 1-D convolution, the short filter before a state-space scan, with an optional SiLU.

y[t] = act(bias + sum_k weight[:, k] * x[t - K + 1 + k]), where positions before the first come from `initial_state`,
or are zero. Shapes: B batch, T positions, C channels, K taps. The state is the last K - 1 inputs, [B, C, K - 1].
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops import backend
from ssmttm.ops.common import check_shapes, unsupported_dtype

Activation = Literal["silu"] | None


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
    padded = torch.cat([_history(x, weight, initial_state), x], 1)  # [B, K-1+T, C]
    if lengths is None:
        final_state = padded[:, x.shape[1] :].transpose(1, 2)  # [B, C, K-1]
    else:
        last = lengths[:, None] + torch.arange(weight.shape[1] - 1, device=x.device)  # [B, K-1]
        final_state = padded[torch.arange(len(x), device=x.device)[:, None], last].transpose(1, 2)
    if kernel is not None:
        history, x = padded[:, : -x.shape[1]].transpose(1, 2), padded[:, -x.shape[1] :].transpose(1, 2)  # [B, C, T]
        bias = None if bias is None else bias.to(weight.dtype)
        return kernel(x, weight, bias, initial_states=history, activation=activation).transpose(1, 2), final_state
    return _ShiftedSum.apply(padded, weight, bias, activation), final_state


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
    """The convolution as K shifted multiply-adds over [B, T, C].

    On a CPU this is about 2.5 times faster than `F.conv1d` with its two transposes, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        length = padded.shape[1] - weight.shape[1] + 1
        taps, inputs = weight.t().contiguous(), padded.to(weight.dtype)  # [K, C], [B, K-1+T, C]
        y = inputs[:, :length] * taps[0] if bias is None else torch.addcmul(bias, inputs[:, :length], taps[0])
        for k in range(1, len(taps)):
            y.addcmul_(inputs[:, k : k + length], taps[k])
        y = y.to(padded.dtype)
        ctx.save_for_backward(padded, taps, y if activation else None)
        ctx.has_bias = bias is not None
        return F.silu(y) if activation else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, taps, pre_activation = ctx.saved_tensors
        if pre_activation is not None:
            grad = torch.ops.aten.silu_backward(grad, pre_activation)
        length, dtype = grad.shape[1], padded.dtype
        grad, padded = grad.to(taps.dtype), padded.to(taps.dtype)
        grad_padded, grad_taps = torch.zeros_like(padded), torch.empty_like(taps)
        for k in range(len(taps)):
            grad_padded[:, k : k + length].addcmul_(grad, taps[k])
            grad_taps[k] = (grad * padded[:, k : k + length]).sum((0, 1))
        grad_bias = grad.sum((0, 1)) if ctx.has_bias else None
        return grad_padded.to(dtype), grad_taps.t(), grad_bias, None
