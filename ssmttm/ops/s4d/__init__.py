"""S4D, a diagonal linear time-invariant state space (Gu, Gupta, Goel and Ré, arXiv 2206.11893).

Each channel has its own complex diagonal system with B = 1, discretised by zero-order hold. With a state h that starts
at `initial_state` or zero:

    h[t] = exp(dt A) h[t-1] + (exp(dt A) - 1)/A x[t]        y[t] = 2 Re(sum over the modes of C h[t]) + D x[t]

Modes come in conjugate pairs, of which one is kept: M = N/2 modes make a real system with N states.
Shapes: B batch, T positions, D channels, M modes. x [B, T, D], dt [D] > 0, A [D, M] complex with a negative real part,
C [D, M] complex, D [D], state [B, D, M] complex. The system and the state are float32 and complex64 whatever the dtype
of the input (float64 and complex128 where the input is float64); y has the dtype of x.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.ops.s4d.naive import accumulation_operands, check_operands, complex_exp, discretise, s4d_reference

__all__ = ["discretise", "s4d", "s4d_final_state", "s4d_flops", "s4d_outputs", "s4d_reference", "s4d_step"]


def s4d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `s4d_reference`, fast: `s4d_outputs` and `s4d_final_state`.

    Args:
        lengths: valid leading positions of each row, [B]; the final state is the one after them. None: all.
    """
    y = s4d_outputs(x, dt, A, C, D, initial_state)
    return y, s4d_final_state(x, dt, A, initial_state, lengths)


def s4d_outputs(
    x: Tensor, dt: Tensor, A: Tensor, C: Tensor, D: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """y [B, T, D] alone: x convolved by FFT with the impulse response, plus the response to the initial state."""
    check_operands(x, dt, A, C, D, initial_state)
    dtype, length = x.dtype, x.shape[1]
    x, dt, A, C, D, state = accumulation_operands(x, dt, A, C, D, initial_state)
    decay, gain = discretise(dt, A)
    weights = (C * gain)[None]  # [1, D, M]
    if state is not None:
        weights = torch.cat([weights, C * decay * state])  # [1 + B, D, M]
    with torch.autocast(x.device.type, enabled=False):
        responses = _responses(weights, dt[:, None] * A, length)  # [1 (+ B), D, T]
    n = _fft_length(length)
    y = torch.fft.irfft(torch.fft.rfft(x.mT, n) * torch.fft.rfft(responses[0], n), n)[..., :length]  # [B, D, T]
    if state is not None:
        y = y + responses[1:]
    return (y.mT if D is None else torch.addcmul(y.mT, x, D)).to(dtype)


def s4d_final_state(
    x: Tensor, dt: Tensor, A: Tensor, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """The state after the last position, [B, D, M], or after the first `lengths` [B] positions of each row."""
    check_operands(x, dt, A, A, None, initial_state)
    if lengths is None:
        lengths = torch.full((len(x),), x.shape[1], device=x.device)
    order = lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device)  # [B, T], last position first
    reversed_x = x[torch.arange(len(x), device=x.device)[:, None], order.clamp(min=0)].masked_fill(
        order[..., None] < 0, 0
    )
    reversed_x, dt, A, state = accumulation_operands(reversed_x, dt, A, initial_state)
    exponent = dt[:, None] * A
    with torch.autocast(x.device.type, enabled=False):
        final = discretise(dt, A)[1] * _moments(reversed_x, exponent)
    return final if state is None else final + complex_exp(exponent * lengths[:, None, None]) * state


def s4d_step(x: Tensor, decay: Tensor, gain: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """One position, x [B, D] -> y [B, D]; `state` [B, D, M] is updated in place.

    `decay` and `gain` come from `discretise`: they are the same at every step and cost more than the step.
    """
    x_ = x.to(C.real.dtype)
    state.mul_(decay).add_(gain * x_[..., None])
    y = 2 * (C * state).real.sum(-1)
    return (y if D is None else torch.addcmul(y, x_, D)).to(x.dtype)


def s4d_flops(length: int, channels: int, d_state: int) -> int:
    """Forward FLOPs of `s4d_outputs` over one sequence: the impulse response and three real FFTs of 2.5 n log2(n)."""
    blocks, width = _blocks(length)
    n = _fft_length(length)
    return channels * (2 * blocks * width * d_state + round(7.5 * n * math.log2(n)) + 3 * n)


def _responses(weights: Tensor, exponent: Tensor, length: int) -> Tensor:
    """2 Re(sum over the modes of weights exp(l exponent)) for l < T: weights [R, D, M] -> [R, D, T].

    A Vandermonde product. With l = i q + j its powers are products of I + q of them, and it is one matrix product.
    """
    coarse, fine = _powers(exponent, length)  # [D, I, M], [D, q, M]
    rows = (weights.transpose(0, 1)[:, :, None] * coarse[:, None]).flatten(1, 2)  # [D, R*I, M]
    product = torch.cat([rows.real, -rows.imag], -1) @ torch.cat([fine.real, fine.imag], -1).mT  # [D, R*I, q]
    return 2 * product.unflatten(1, (len(weights), -1)).flatten(2)[..., :length].transpose(0, 1)


def _moments(reversed_x: Tensor, exponent: Tensor) -> Tensor:
    """sum over l of exp(l exponent) reversed_x[:, l]: [B, T, D] -> [B, D, M], the transpose of `_responses`."""
    coarse, fine = _powers(exponent, reversed_x.shape[1])  # [D, I, M], [D, q, M]
    blocks, width = coarse.shape[1], fine.shape[1]
    padded = F.pad(reversed_x, (0, 0, 0, blocks * width - reversed_x.shape[1]))  # [B, I*q, D]
    rows = padded.movedim(2, 0).reshape(len(exponent), -1, width)  # [D, B*I, q]
    within = torch.complex(rows @ fine.real, rows @ fine.imag)  # [D, B*I, M]
    return (within.unflatten(1, (-1, blocks)) * coarse[:, None]).sum(2).transpose(0, 1)


def _powers(exponent: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """exp(i q exponent) and exp(j exponent), [D, I, M] and [D, q, M], whose products cover l = i q + j < T."""
    blocks, width = _blocks(length)
    counts = torch.arange(max(blocks, width), device=exponent.device, dtype=exponent.real.dtype)[:, None]
    return complex_exp(exponent[:, None] * (width * counts[:blocks])), complex_exp(exponent[:, None] * counts[:width])


def _blocks(length: int) -> tuple[int, int]:
    """I and q, near the root of T, with I q >= T."""
    width = math.ceil(math.sqrt(length))
    return math.ceil(length / width), width


def _fft_length(length: int) -> int:
    """At least 2T - 1, so that nothing wraps around, and with no prime factor above 13."""
    step = 1 << max(0, (2 * length).bit_length() - 4)
    return math.ceil(2 * length / step) * step
