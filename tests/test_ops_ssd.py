"""The scan and the convolution against their sequential references: values, gradients, states, extremes, dispatch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.errors import UserError
from ssmttm.ops import backend
from ssmttm.ops.conv import causal_conv, causal_conv_reference, causal_conv_step
from ssmttm.ops.ssd import ssd, ssd_flops, ssd_reference, ssd_step

QUICK = settings(max_examples=15, deadline=None, derandomize=True)


def operands(batch, length, heads, width, groups, n, seed=0, dtype=torch.float64):
    """x, dt, A, B, C, D, initial_state, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(batch, length, *s, generator=g) for s in ((heads, width), (groups, n), (groups, n)))
    dt = torch.exp(torch.rand(batch, length, heads, generator=g) * 4.6 - 6.9)  # 0.001 to 0.1
    A = -1 - 15 * torch.rand(heads, generator=g)
    D, state = torch.randn(heads, generator=g), torch.randn(batch, heads, width, n, generator=g)
    return [M.to(dtype).requires_grad_() for M in (x, dt, A, B, C, D, state)]


def results(function, arguments, **options):
    """y, the final state, and the gradients of a fixed random projection of both."""
    y, state = function(*arguments, **options)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=g).to(out.dtype) for out in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], [a for a in arguments if a is not None], weights)]


def assert_close(found, expected, tolerance):
    """Each tensor within `tolerance` of the largest magnitude of its expectation."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)
        assert error <= tolerance, f"result {index}: relative error {error:.2e}"


shapes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 300),
    "chunk": st.integers(1, 64),
    "groups": st.sampled_from([1, 2]),
    "with_state": st.booleans(),
    "with_D": st.booleans(),
}


@QUICK
@given(**shapes)
def test_ssd_equals_reference(batch, length, chunk, groups, with_state, with_D):
    exact = operands(batch, length, 4, 8, groups, 5, seed=length)
    exact[5], exact[6] = exact[5] if with_D else None, exact[6] if with_state else None
    expected = results(ssd_reference, exact)
    assert_close(results(ssd, exact, chunk_size=chunk), expected, 1e-11)
    single = [None if a is None else a.detach().float().requires_grad_() for a in exact]
    assert_close(results(ssd, single, chunk_size=chunk), expected, 3e-5)


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (100, 32), (257, 64)])
def test_ssd_bfloat16_is_close_to_reference(length, chunk):
    rounded = operands(2, length, 4, 16, 2, 16, dtype=torch.bfloat16)
    accumulation = {1, 2, 5, 6}  # dt, A, D and the state are float32 whatever the input
    mixed = [a.detach().float().requires_grad_() if i in accumulation else a for i, a in enumerate(rounded)]
    y, state = ssd(*mixed, chunk_size=chunk)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected = results(ssd_reference, [a.detach().double().requires_grad_() for a in mixed])
    assert_close(results(ssd, mixed, chunk_size=chunk), expected, 2e-2)


def test_ssd_gradients_equal_finite_differences():
    arguments = operands(2, 7, 2, 2, 1, 3)
    assert torch.autograd.gradcheck(lambda *a: ssd(*a, chunk_size=3), arguments)


def test_ssd_extreme_values_are_finite_and_exact():
    x, dt, A, B, C, D, state = operands(1, 4096, 2, 4, 1, 4, dtype=torch.float32)
    dt, A = torch.full_like(dt, 0.1).requires_grad_(), torch.full_like(A, -16.0).requires_grad_()
    arguments = [x, dt, A, B, C, D, state]
    found = results(ssd, arguments)
    assert all(M.isfinite().all() for M in found)
    exact = [a.detach().double().requires_grad_() for a in arguments]
    assert_close(found, results(ssd, exact, chunk_size=16), 2e-4)


@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_ssd_two_segments_equal_one(cut):
    x, dt, A, B, C, D, state = operands(2, 100, 4, 8, 2, 5)
    whole = ssd(x, dt, A, B, C, D, state)
    first, carried = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state)
    second, final = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, carried)
    assert_close([torch.cat([first, second], 1), final], whole, 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_steps_equal_reference(groups):
    x, dt, A, B, C, D, initial = (M.detach() for M in operands(2, 20, 4, 8, groups, 5, dtype=torch.float32))
    expected = ssd_reference(x, dt, A, B, C, D, initial)
    state = initial.clone()
    y = torch.stack([ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(20)], 1)
    assert_close([y, state], expected, 1e-5)


def test_ssd_rejects_mismatched_shapes():
    x, dt, A, B, C, D, state = operands(2, 10, 4, 8, 2, 5)
    with pytest.raises(ValueError, match="C has shape"):
        ssd(x, dt, A, B, C[:, :9], D, state)
    with pytest.raises(ValueError, match="B has shape"):
        ssd(x, dt, A, B[:1], C, D, state)
    with pytest.raises(ValueError, match="H a multiple of G"):
        ssd(x[:, :, :3], dt[:, :, :3], A[:3], B, C)


def test_ssd_flops_equal_counted_flops():
    x, dt, A, B, C, D, _ = operands(1, 150, 4, 16, 2, 8)
    with FlopCounterMode(display=False) as counter:
        ssd(x, dt, A, B, C, D, chunk_size=32)
    assert ssd_flops(150, 4, 16, 2, 8, chunk_size=32) == counter.get_total_flops()


@QUICK
@given(
    length=st.integers(1, 20),
    taps=st.integers(2, 5),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
def test_causal_conv_equals_reference(length, taps, with_bias, with_state, activation):
    g = torch.Generator().manual_seed(length)
    shapes = [(2, length, 6), (6, taps), (6,) if with_bias else None, (2, 6, taps - 1) if with_state else None]
    arguments = [s and torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    found = results(causal_conv, arguments, activation=activation)
    assert_close(found, results(causal_conv_reference, arguments, activation=activation), 1e-12)


def test_causal_conv_steps_equal_reference():
    x, weight, bias, initial = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)
    expected = causal_conv_reference(x, weight, bias, initial, "silu")
    state = initial.clone()
    y = torch.stack([causal_conv_step(column, weight, bias, state, "silu") for column in x.unbind(1)], 1)
    assert_close([y, state], expected, 1e-6)


def test_causal_conv_final_state_is_taken_at_each_rows_length():
    x, weight, initial = torch.randn(3, 9, 6), torch.randn(6, 4), torch.randn(3, 6, 3)
    lengths = torch.tensor([0, 2, 9])
    _, state = causal_conv(x, weight, None, initial, lengths=lengths)
    for row, length in enumerate(lengths):
        inputs = torch.cat([initial[row], x[row, :length].T], 1)  # [C, K-1 + length]
        assert torch.equal(state[row], inputs[:, -3:])


def test_backend_is_portable_on_cpu_and_cuda_cannot_be_forced():
    arguments = operands(1, 3, 2, 2, 1, 2)
    assert backend.cuda_kernel("ssd", torch.device("cpu")) is None
    with backend.use("cuda"), pytest.raises(UserError, match="got tensors on cpu"):
        ssd(*arguments)
    with backend.use("portable"):
        assert {row.kernel for row in backend.describe()} == {"torch"}
    ssd(*arguments)
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        backend.set_backend("fast")


def test_backend_missing_kernel_names_what_to_install(monkeypatch):
    missing = backend.Kernel("no_such_package.ops", "scan")
    monkeypatch.setitem(backend.KERNELS, "ssd", missing)
    backend._load.cache_clear()
    cuda = torch.device("cuda")
    try:
        assert backend.cuda_kernel("ssd", cuda) is None
        with backend.use("cuda"), pytest.raises(UserError, match=r"no_such_package .*pip install ssmttm\[cuda\]"):
            backend.cuda_kernel("ssd", cuda)
    finally:
        backend._load.cache_clear()


def test_backend_installed_kernel_gets_its_own_arguments(monkeypatch):
    """The adapters, without a GPU: kernels that check what mamba_ssm's check, and return the portable result."""

    def scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
        assert return_final_states
        with backend.use("portable"):
            return ssd(x, dt, A, B, C, D, initial_states, chunk_size)

    def update(state, x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False):
        assert A.shape == state.shape[1:] and dt.shape == x.shape and D.shape == dt_bias.shape == x.shape[1:]
        assert A.stride()[-2:] == (0, 0) and dt.stride(-1) == dt_bias.stride(-1) == 0 and not dt_bias.any()
        with backend.use("portable"):
            return ssd_step(x, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], state)

    def convolve(x, weight, bias, initial_states=None, activation=None):
        with backend.use("portable"):
            return causal_conv(x.mT, weight, bias, initial_states, activation)[0].mT

    def shift(x, conv_state, weight, bias, activation):
        with backend.use("portable"):
            return causal_conv_step(x, weight, bias, conv_state, activation)

    kernels = {"ssd": scan, "ssd_step": update, "causal_conv": convolve, "causal_conv_step": shift}
    arguments = [M.detach() for M in operands(2, 10, 4, 8, 2, 5, dtype=torch.float32)]
    x, dt, A, B, C, D, initial = arguments
    signal, weight, bias, history = torch.randn(2, 10, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)

    def everything():
        scan_state, conv_state = initial.clone(), history.clone()
        step = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, scan_state)
        without_D = ssd_step(x[:, 1], dt[:, 1], A, B[:, 1], C[:, 1], None, scan_state)
        conv_step = causal_conv_step(signal[:, 0], weight, bias, conv_state, "silu")
        outputs = [*ssd(*arguments), *causal_conv(signal, weight, bias, history, "silu"), step, conv_step]
        return [*outputs, without_D, scan_state, conv_state]

    expected = everything()
    monkeypatch.setattr(
        backend, "cuda_kernel", lambda name, *_: None if backend._chosen == "portable" else kernels[name]
    )
    assert_close(everything(), expected, 1e-6)


def test_ops_import_no_kernel_package():
    code = "import sys, ssmttm.ops.ssd, ssmttm.ops.conv; assert not {'mamba_ssm', 'causal_conv1d'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ssd_later_positions_have_exactly_zero_gradient():
    """Exactly zero, not a rounding error: padding after a sequence would pass it through every layer."""
    arguments = operands(2, 50, 4, 8, 2, 5, dtype=torch.float32)
    y, _ = ssd(*arguments, chunk_size=16)
    gradients = torch.autograd.grad(y[:, :30].square().sum(), arguments)
    for gradient in gradients[0], gradients[1], gradients[3], gradients[4]:
        assert gradient[:, :30].any() and not gradient[:, 30:].any()
