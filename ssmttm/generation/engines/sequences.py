"""Convolution and scan of Mamba-2 over whole sequences in the compiled library (step.cpp), position after position.

They take the place of torch's in a prefill and in the second stage, whose sequences are short: there the chunks of
`ssmttm.ops.ssd` cost many calls for little work. Channels and heads are shared among as many threads as torch uses; a
row has the same bits in any batch and with any number of threads. Shapes as in `ssmttm.ops`.
"""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ssmttm.generation.engines.library import Pool, Unavailable, library
from ssmttm.ops import backend


class _Scan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("length", "heads", "headdim", "groups", "d_state", "x_stride", "bc_stride")
    ]  # fmt: skip


def compiled_sequences(device: torch.device) -> AbstractContextManager[None]:
    """A context in which mixers on a CPU use the library, in float32, where no gradient is recorded; without an effect
    on another device, and if the library cannot be built."""
    if device.type != "cpu":
        return nullcontext()
    try:
        pool = Pool(library(), torch.get_num_threads())
    except Unavailable:
        return nullcontext()
    return backend.cpu_kernels({"causal_conv": partial(convolve, pool), "ssd": partial(scan, pool)})


def convolve(pool: Pool, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor) -> Tensor:
    """`causal_conv` with SiLU: x [B, T, C] -> [B, T, C]. `past` [B, K-1, C], contiguous, takes in the last inputs."""
    if x.stride(2) != 1:
        x = x.contiguous()
    taps, y = weight.t().contiguous(), x.new_empty(x.shape)
    batch, length, channels = x.shape
    library().ssmttm_convolve(
        pool.address, taps.data_ptr(), None if bias is None else bias.data_ptr(), len(taps), channels, past.data_ptr(),
        x.data_ptr(), x.stride(0), x.stride(1), batch, length, y.data_ptr(),
    )  # fmt: skip
    return y


def scan(
    pool: Pool, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd`."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    x, B, C = (_by_position(tensor) for tensor in (x, B, C))
    if B.stride(1) != C.stride(1):
        B, C = B.contiguous(), C.contiguous()
    dt, A = dt.contiguous(), A.contiguous()
    D = None if D is None else D.contiguous()
    shape = batch, heads, width, n
    state = x.new_zeros(shape) if initial_state is None else initial_state.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(batch, length, heads, width)
    settings = _Scan(length, heads, width, groups, n, x.stride(1), B.stride(1))
    at: list[int | None] = [tensor.data_ptr() for tensor in (x, dt, A, B, C)]
    at += [None if D is None else D.data_ptr(), state.data_ptr()]
    library().ssmttm_scan(pool.address, ctypes.addressof(settings), *at, batch, y.data_ptr())
    return y, state


def _by_position(tensor: Tensor) -> Tensor:
    """[B, T, n, m] with contiguous positions at equal distances over all rows."""
    inner = tensor.stride()[2:] == (tensor.shape[3], 1)
    if inner and tensor.stride(0) == tensor.shape[1] * tensor.stride(1):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of an axis of length 1
