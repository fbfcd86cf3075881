"""mamba_ssm and causal_conv1d on a CPU, and ssmttm's adapters to them."""

import functools
import importlib.machinery
import sys
import types
from contextlib import contextmanager

import interpreter  # before anything imports triton
import torch
from compiled_modules import conv_module, scan_module

from ssmttm.ops import backend


@functools.cache
def install():
    """Complete the interpreter and put stand-ins for the compiled modules into `sys.modules`."""
    interpreter.complete_interpreter()
    sys.modules["selective_scan_cuda"], sys.modules["causal_conv1d_cuda"] = scan_module(), conv_module()
    _skip_init("mamba_ssm")  # it imports transformers and the package's models


@contextmanager
def adapters():
    """Within, ssmttm's adapters take CPU tensors to the kernels, which must load. The choice is the same otherwise."""
    choose = backend.cuda_kernel

    def cuda_kernel(operation, device, unsupported=""):
        function = choose(operation, torch.device("cuda"), unsupported)
        assert function or unsupported, backend._load(operation)
        return function

    backend.cuda_kernel = cuda_kernel
    try:
        yield
    finally:
        backend.cuda_kernel = choose


@contextmanager
def on_cuda():
    """Within, tensors say that they are on a GPU: the backward of mamba_ssm's Mamba-3 asserts it."""
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


@contextmanager
def unrounded_mamba3():
    """Within, mamba_ssm's Mamba-3 leaves float32 as it is: its Python names torch.bfloat16, its kernels do not."""
    from mamba_ssm.ops.triton.mamba3 import mamba3_siso_combined as combined
    from mamba_ssm.ops.triton.mamba3 import mamba3_siso_fwd as forward

    float32_only = types.ModuleType("torch")
    float32_only.__dict__.update(vars(torch), bfloat16=torch.float32)
    combined.torch = forward.torch = float32_only
    try:
        yield
    finally:
        combined.torch = forward.torch = torch


def _skip_init(name):
    """Put a package into `sys.modules` without running its __init__."""
    spec = importlib.machinery.PathFinder.find_spec(name)
    package = types.ModuleType(name)
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[name] = package
