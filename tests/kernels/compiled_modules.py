"""Stand-ins for the compiled modules `causal_conv1d_cuda` and `selective_scan_cuda`.

Each function checks what its C++ entry point checks (causal_conv1d 1.7.0, csrc/causal_conv1d.cpp; mamba_ssm
2.3.2.post1, csrc/selective_scan/selective_scan.cpp) and computes with the package's own reference. So they show whether
a call is accepted and what it means, and nothing about the compiled kernels.
"""

import math
import types

import torch

FLOATS = torch.float32, torch.float16, torch.bfloat16


def check(condition, message):
    if not condition:
        raise RuntimeError(message)


def conv_module():
    module = types.ModuleType("causal_conv1d_cuda")
    module.causal_conv1d_fwd, module.causal_conv1d_bwd = _conv_forward, _conv_backward
    module.causal_conv1d_update = _conv_update
    return module


def scan_module():
    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = _scan_forward, _scan_backward
    return module


# --- causal_conv1d: x [B, C, T], weight [C, K]


def _channels_last(x):
    return x.stride(1) == 1 and x.stride(2) > 1


def _check_conv(x, weight, bias, seq_idx, initial):
    batch, channels, _ = x.shape
    taps = weight.shape[-1]
    check(x.dtype in FLOATS and weight.dtype in FLOATS, "dtype of x or weight")
    check(weight.shape == (channels, taps) and 2 <= taps <= 4, "weight: 2 to 4 taps")
    check(x.stride(2) == 1 or x.stride(1) == 1, "strides of x")
    if _channels_last(x):
        check(channels % 8 == 0, "channels % 8")
        check(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0, "alignment of x")
    if bias is not None:
        check(bias.dtype == weight.dtype and bias.stride(-1) == 1 and bias.shape == (channels,), "bias")
    check(seq_idx is None, "seq_idx is not covered here")
    if initial is not None:
        check(_channels_last(x), "initial_states needs channels last")
        check(initial.dtype == x.dtype and initial.shape == (batch, channels, taps - 1), "initial_states")
        aligned = initial.stride(1) == 1 and initial.stride(2) % 8 == 0 and initial.data_ptr() % 16 == 0
        check(aligned, "alignment of initial_states")


def _conv_reference(x, weight, bias, initial, silu):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    wide = [None if tensor is None else tensor.float() for tensor in (x, weight, bias, initial)]
    return causal_conv1d_ref(*wide, activation="silu" if silu else None)


def _conv_forward(x, weight, bias, seq_idx, initial, out, final_out, silu):
    _check_conv(x, weight, bias, seq_idx, initial)
    check(final_out is None, "final states are not covered here")
    out.copy_(_conv_reference(x, weight, bias, initial, silu))


def _conv_backward(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu):
    _check_conv(x, weight, bias, seq_idx, initial)
    check(dfinal is None, "final states are not covered here")
    if _channels_last(x):
        if dout.stride(1) != 1:
            dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        check(dout.stride(2) % 8 == 0 and dout.stride(0) % 8 == 0 and dx.stride(1) == 1, "alignment of gradients")
    taps, length = weight.shape[-1], x.shape[-1]
    before = x.new_zeros(*x.shape[:2], taps - 1) if initial is None else initial
    padded = torch.cat([before, x], -1).float()
    pre_activation = _conv_reference(x, weight, bias, initial, silu=False)  # autograd is off within a custom operator
    gate = torch.sigmoid(pre_activation)
    grad = dout.float() * (gate * (1 + pre_activation * (1 - gate)) if silu else 1)  # [B, C, T]
    grad_padded = torch.zeros_like(padded)
    for tap in range(taps):
        grad_padded[..., tap : tap + length] += grad * weight.float()[:, tap, None]
        dweight[:, tap] += (grad * padded[..., tap : tap + length]).sum((0, 2))
    dx.copy_(grad_padded[..., taps - 1 :])
    if dbias is not None:
        dbias.add_(grad.sum((0, 2)))
    if dinitial is not None:
        check(dinitial.stride(1) == 1, "strides of the gradient of initial_states")
        dinitial.copy_(grad_padded[..., : taps - 1])


def _conv_update(x, state, weight, bias, out, silu, cache_seqlens, indices):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    taps = weight.shape[-1]
    check(x.dtype in FLOATS and weight.dtype in FLOATS, "dtype of x or weight")
    check(state.dtype == x.dtype, "conv_state must have the dtype of x")
    check(state.shape[2] >= taps - 1 and state.shape[:2] == x.shape[:2] and 2 <= taps <= 4, "shapes")
    check(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "bias")
    check(cache_seqlens is None and indices is None, "caches are not covered here")
    after, wide_bias = state.float(), None if bias is None else bias.float()
    out.copy_(causal_conv1d_update_ref(x.float(), after, weight.float(), wide_bias, "silu" if silu else None))
    state.copy_(after)


# --- selective_scan: u, delta and the gate z [B, D, T], A [D, N], B and C [B, G, N, T], delta_bias [D]


def _check_scan(u, delta, A, B, C, D, z, delta_bias):
    batch, width, length = u.shape
    n = A.shape[1]
    check(u.dtype in FLOATS and A.dtype == torch.float32, "dtype of u or A")
    check(delta.dtype == B.dtype == C.dtype == u.dtype and (z is None or z.dtype == u.dtype), "dtypes")
    check(n <= 256, "d_state <= 256")
    check(A.shape == (width, n), "shape of A")
    for operand in (u, delta, z):
        check(operand is None or (operand.shape == u.shape and _dense_last(operand)), "u, delta or z")
    for operand in (B, C):
        check(operand.shape == (batch, operand.shape[1], n, length) and _dense_last(operand), "B or C")
    for operand in (D, delta_bias):
        check(operand is None or (operand.dtype == torch.float32 and _dense_last(operand)), "D or delta_bias")


def _dense_last(operand):
    return operand.stride(-1) == 1 or operand.shape[-1] == 1


def _scan_reference(u, delta, A, B, C, D, z, delta_bias, softplus):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state=True)


def _scan_forward(u, delta, A, B, C, D, z, delta_bias, softplus):
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    y, last = _scan_reference(u, delta, A, B, C, D, None, delta_bias, softplus)
    states = last.new_full((*u.shape[:2], math.ceil(u.shape[2] / 2048), 2 * A.shape[1]), math.nan)
    states[:, :, -1, 1::2] = last
    results = [torch.empty_like(delta).copy_(y), states]
    return results if z is None else [*results, _scan_reference(u, delta, A, B, C, D, z, delta_bias, softplus)[0]]


def _scan_backward(u, delta, A, B, C, D, z, delta_bias, dout, states, out, dz, softplus, recompute):
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    check(dout.dtype == u.dtype and _dense_last(dout), "dout")
    operands = u, delta, A, B, C, D, z, delta_bias
    leaves = [None if operand is None else operand.detach().requires_grad_() for operand in operands]
    with torch.enable_grad():
        y, _ = _scan_reference(*leaves, softplus)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dout))
    *gradients, given_dz, grad_bias = (None if leaf is None else next(found) for leaf in leaves)
    results = [*gradients, grad_bias]
    if z is not None:
        results.append(given_dz if dz is None else dz.copy_(given_dz))
    return [*results, y.detach()] if recompute else results
