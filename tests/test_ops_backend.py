"""The adapters to CUDA kernels, without a GPU: when a kernel is called, and with what.

`make test-kernels` runs the kernels themselves.
"""

import sys

import pytest
import torch

from ssmttm.errors import UserError
from ssmttm.ops import backend
from ssmttm.ops.conv import causal_conv, causal_conv_step
from ssmttm.ops.selective_scan import selective_scan, selective_scan_step
from ssmttm.ops.ssd import ssd, ssd_step

FP64 = torch.float64


@pytest.fixture
def on_cuda(monkeypatch):
    """Installs a kernel; the choice then takes CPU tensors for those of a GPU."""
    choose = backend.cuda_kernel

    def install(kernel):
        monkeypatch.setattr(backend, "_load", lambda operation: (kernel, ""))
        monkeypatch.setattr(backend, "cuda_kernel", lambda name, _, why="": choose(name, torch.device("cuda"), why))

    return install


def ones(*shapes, dtype=torch.float32):
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


SSD = (1, 3, 2, 4), (1, 3, 2), (2,), (1, 3, 1, 5), (1, 3, 1, 5), (2,), (1, 2, 4, 5)
SSD_STEP = (1, 2, 4), (1, 2), (2,), (1, 1, 5), (1, 1, 5), (2,), (1, 2, 4, 5)
SCAN_STEP = (1, 8), (1, 8), (8, 5), (1, 5), (1, 5), (8,), (1, 8, 5)


def scan_shapes(n):
    return (1, 3, 8), (1, 3, 8), (8, n), (1, 3, n), (1, 3, n), (8,), (1, 8, n)


@pytest.mark.parametrize(
    ("operation", "operands", "reason"),
    [
        (ssd, ones(*SSD, dtype=FP64), "float64"),
        (ssd_step, ones(*SSD_STEP, dtype=FP64), "float64"),
        (selective_scan, ones(*scan_shapes(4), dtype=FP64), "float64"),
        (selective_scan, ones(*scan_shapes(257)), "d_state 257, above 256"),
        (selective_scan_step, ones(*SCAN_STEP, dtype=FP64), "float64"),
        (causal_conv, ones((1, 3, 8), (8, 4), dtype=FP64), "float64"),
        (causal_conv, ones((1, 3, 12), (12, 4)), "12 channels, no multiple of 8"),
        (causal_conv, ones((1, 3, 8), (8, 5)), "d_conv 5, only 2 to 4"),
        (causal_conv_step, [*ones((1, 12), (12, 1)), None, *ones((1, 12, 0))], "d_conv 1, only 2 to 4"),
    ],
)
def test_operands_that_a_kernel_does_not_take_run_portably(on_cuda, operation, operands, reason):
    def copies():
        return [None if value is None else value.clone() for value in operands]

    expected = operation(*copies())
    on_cuda(lambda *_, **__: pytest.fail("the kernel was called"))
    torch.testing.assert_close(operation(*copies()), expected, rtol=0, atol=0)
    with backend.use("cuda"), pytest.raises(UserError, match=f"does not take {reason}: set 'auto'"):
        operation(*copies())


def test_ssd_kernel_gets_a_copy_of_the_initial_state(on_cuda):
    """The kernel keeps it for its backward, and a mixer writes the final state into its own."""
    kept = []

    def kernel(x, *_, initial_states, **__):
        kept.append(initial_states)
        return x, initial_states

    *operands, initial = ones(*SSD)
    on_cuda(kernel)
    ssd(*operands, initial)
    initial.zero_()
    assert kept[0].all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_convolution_kernels_get_one_dtype_of_x_and_state_and_the_weight_as_it_is(on_cuda, state_dtype):
    def kernel(x, state, weight, bias, activation):
        assert state.dtype == x.dtype and weight.dtype == bias.dtype == torch.float32
        return causal_conv_step_portable(x, weight, bias, state)

    def causal_conv_step_portable(x, weight, bias, state):
        with backend.use("portable"):
            return causal_conv_step(x, weight, bias, state, "silu")

    x, weight, bias = torch.randn(2, 8).bfloat16(), torch.randn(8, 4), torch.randn(8).bfloat16()
    state = torch.randn(2, 8, 3).to(state_dtype)
    found, expected = state.clone(), state.clone()
    y = causal_conv_step(x, weight, bias, expected, "silu")
    on_cuda(kernel)
    torch.testing.assert_close(causal_conv_step(x, weight, bias, found, "silu"), y, rtol=0, atol=0)
    assert torch.equal(found, expected) and not torch.equal(found, state)


def test_convolution_kernel_for_sequences_gets_a_float32_weight(on_cuda):
    def kernel(x, weight, bias, initial_states, activation):
        assert x.dtype == initial_states.dtype == torch.bfloat16 and weight.dtype == bias.dtype == torch.float32
        return x

    on_cuda(kernel)
    causal_conv(torch.ones(1, 3, 8).bfloat16(), torch.ones(8, 4), torch.ones(8).bfloat16())


@pytest.mark.parametrize("error", ["ImportError", "ValueError", "RuntimeError", "KeyError"])
def test_package_that_fails_to_load_gives_no_kernel_whatever_was_imported_before(tmp_path, monkeypatch, error):
    package = f"kernels_{error.lower()}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"import {package}.scan\nraise {error}('no such driver')\n")
    (tmp_path / package / "scan.py").write_text("def scan():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backend.KERNELS, "ssd", backend.Kernel(f"{package}.scan", "scan"))
    try:
        for _ in range(2):  # the failed import leaves the submodule in sys.modules
            backend._load.cache_clear()
            function, problem = backend._load("ssd")
            assert function is None and "no such driver" in problem
            assert f"{package}.scan" in sys.modules
    finally:
        backend._load.cache_clear()
