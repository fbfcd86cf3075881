"""Triton's interpreter, completed by what mamba_ssm's kernels need on a CPU. Import it before anything imports triton.

`complete_interpreter()` adds:

- bfloat16. The interpreter keeps it as uint16 and adds and multiplies the bits as integers, and its conversion from
  float32 truncates. Here an operation widens its operands first, and conversion rounds to nearest, ties to even.
- cos, sin and tanh in PTX, which Mamba-3 uses.
- One configuration for each autotuned kernel, that with the largest tiles: there is no GPU to measure them on.
- `torch.cuda.device` and the number of multiprocessors, which raise without CUDA.

What the interpreter cannot show: TF32 products, shared memory and registers, alignment, races, speed, and whether a
kernel compiles at all.
"""

import math
import os
import types
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"  # read when triton decorates its functions, also those of its own library

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
PTX = {"cos.approx.f32": np.cos, "sin.approx.f32": np.sin, "tanh.approx.f32": np.tanh}


def complete_interpreter():
    _add_bfloat16(interpreter.InterpreterBuilder)
    _add_bfloat16_sum()
    _add_bfloat16_atomics(interpreter.InterpreterBuilder)
    _add_ptx(interpreter.InterpreterBuilder)
    _choose_largest_tiles()
    torch.cuda.device = lambda index: nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=2)


def from_bfloat16(bits):
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values):
    """float32 -> uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(from_bfloat16(handle.data), tl.float32)


def _narrow(handle):
    return interpreter.TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _add_bfloat16(builder):
    unary, binary, dot, cast = builder.unary_op, builder.binary_op, builder.create_dot, builder.cast_impl
    to_float, fma = builder.create_fp_to_fp, builder.create_fma

    def unary_op(self, argument, op):
        result = unary(self, _wide(argument), op)
        return _narrow(result) if _is_bfloat16(argument) else result

    def binary_op(self, left, right, op):
        result = binary(self, _wide(left), _wide(right), op)
        either = _is_bfloat16(left) or _is_bfloat16(right)
        return _narrow(result) if either and op not in COMPARISONS else result

    def create_dot(self, a, b, d, *rest):
        return dot(self, _wide(a), _wide(b), d, *rest)

    def create_fma(self, x, y, z):
        result = fma(self, _wide(x), _wide(y), _wide(z))
        return _narrow(result) if _is_bfloat16(z) else result

    def convert(self, source, target, other):
        if _is_bfloat16(source) and target.scalar != tl.bfloat16:
            source = _wide(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return _narrow(interpreter.TensorHandle(source.data.astype(np.float32), tl.float32))
        return other()

    def cast_impl(self, source, target):
        return convert(self, source, target, lambda: cast(self, source, target))

    def create_fp_to_fp(self, source, target, rounding_mode):
        return convert(self, source, target, lambda: to_float(self, source, target, rounding_mode))

    builder.unary_op, builder.binary_op, builder.create_dot = unary_op, binary_op, create_dot
    builder.cast_impl, builder.create_fp_to_fp, builder.create_fma = cast_impl, create_fp_to_fp, create_fma
    builder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))  # missing before Triton 3.8


def _add_bfloat16_sum():
    reduce_sum = interpreter.ReduceOps.sum

    def sum_(self, input):
        if input.dtype.scalar != tl.bfloat16:
            return reduce_sum(self, input)
        total = np.sum(from_bfloat16(input.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(to_bfloat16(total), input.dtype)

    interpreter.ReduceOps.sum = sum_


def _add_bfloat16_atomics(builder):
    """An atomic addition is a load, a sum and a store: the interpreter runs one program after the other."""
    atomic = builder.create_atomic_rmw

    def create_atomic_rmw(self, op, pointer, value, mask, *rest):
        if not _is_bfloat16(value):
            return atomic(self, op, pointer, value, mask, *rest)
        raw, zeros = interpreter._interpreter, np.zeros_like(pointer.data, dtype=np.uint16)
        old = raw.load(pointer.data, mask.data, zeros, np.dtype(np.uint16))
        raw.store(pointer.data, to_bfloat16(from_bfloat16(old) + from_bfloat16(value.data)), mask.data)
        return interpreter.TensorHandle(old, tl.bfloat16)

    builder.create_atomic_rmw = create_atomic_rmw


def _add_ptx(builder):
    def create_inline_asm(self, asm, constraints, arguments, types_, is_pure, pack):
        result = self.unary_op(arguments[0], PTX[asm.split()[0]])
        return types.SimpleNamespace(get_result=lambda index: result)

    builder.create_inline_asm = create_inline_asm


def _choose_largest_tiles():
    init = Autotuner.__init__

    def __init__(self, *arguments, **options):  # up to Triton 3.7 it looks for the GPU's benchmark at once
        init(self, *arguments, **{**options, "do_bench": options.get("do_bench") or (lambda *_, **__: None)})

    def prune_configs(self, kwargs):
        def tile(config):
            return math.prod(size for key, size in config.kwargs.items() if key.startswith(("BLOCK_SIZE", "CHUNK")))

        return [max(self.configs, key=tile)]

    Autotuner.__init__, Autotuner.prune_configs = __init__, prune_configs
