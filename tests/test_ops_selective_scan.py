"""The selective scan against its sequential reference: values, gradients, states, extremes, memory, dispatch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm.errors import UserError
from ssmttm.ops import backend
from ssmttm.ops.selective_scan import (
    selective_scan,
    selective_scan_flops,
    selective_scan_reference,
    selective_scan_step,
)

QUICK = settings(max_examples=15, deadline=None, derandomize=True)


def operands(batch, length, width, n, seed=0, dtype=torch.float64):
    """x, dt, A, B, C, D, initial_state, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(batch, length, size, generator=g) for size in (width, n, n))
    dt = torch.exp(torch.rand(batch, length, width, generator=g) * 4.6 - 6.9)  # 0.001 to 0.1
    A = -1 - 15 * torch.rand(width, n, generator=g)
    D, state = torch.randn(width, generator=g), torch.randn(batch, width, n, generator=g)
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


@QUICK
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    chunk=st.integers(1, 64),
    with_state=st.booleans(),
    with_D=st.booleans(),
)
def test_selective_scan_equals_reference(batch, length, chunk, with_state, with_D):
    exact = operands(batch, length, 6, 5, seed=length)
    exact[5], exact[6] = exact[5] if with_D else None, exact[6] if with_state else None
    expected = results(selective_scan_reference, exact)
    assert_close(results(selective_scan, exact, chunk_size=chunk), expected, 1e-12)
    single = [None if a is None else a.detach().float().requires_grad_() for a in exact]
    assert_close(results(selective_scan, single, chunk_size=chunk), expected, 1e-5)


@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (100, 32), (257, 16)])
def test_selective_scan_bfloat16_is_close_to_reference(length, chunk):
    """Operands of the recurrence are rounded to bfloat16, nothing within it is."""
    rounded = operands(2, length, 16, 8, dtype=torch.bfloat16)
    accumulation = {1, 2, 5, 6}  # dt, A, D and the state are float32 whatever the input
    mixed = [a.detach().float().requires_grad_() if i in accumulation else a for i, a in enumerate(rounded)]
    y, state = selective_scan(*mixed, chunk_size=chunk)
    found = results(selective_scan, mixed, chunk_size=chunk)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert [a.dtype for a in found[2:]] == [a.dtype for a in mixed]
    exact = [a.detach().double().requires_grad_() for a in mixed]
    expected_y, expected_state = selective_scan_reference(*exact)
    assert_close([y, state], [expected_y, expected_state], 5e-3)
    assert_close([state], [expected_state], 1e-5)
    assert_close(found, results(selective_scan_reference, exact), 1e-2)


def test_selective_scan_ignores_autocast():
    """Neither in the forward nor in a backward that runs under it."""
    arguments = operands(2, 40, 6, 5, dtype=torch.float32)
    expected = results(selective_scan, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(selective_scan, arguments)
    assert all(map(torch.equal, found, expected))


def test_selective_scan_gradients_equal_finite_differences():
    arguments = operands(2, 7, 2, 3)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, chunk_size=3), arguments)


def test_selective_scan_extreme_values_are_finite_and_exact():
    x, dt, A, B, C, D, state = operands(1, 4096, 4, 4, dtype=torch.float32)
    dt, A = torch.full_like(dt, 0.1).requires_grad_(), torch.full_like(A, -16.0).requires_grad_()
    arguments = [x, dt, A, B, C, D, state]
    found = results(selective_scan, arguments)
    assert all(M.isfinite().all() for M in found)
    exact = [a.detach().double().requires_grad_() for a in arguments]
    assert_close(found, results(selective_scan_reference, exact), 1e-5)
    y, _ = selective_scan(x, 1e4 * dt, A, B, C, D, state)  # the state is forgotten at once: the decay is 0, not NaN
    assert y.isfinite().all()


def test_selective_scan_zero_dt_keeps_state_bit_for_bit():
    x, dt, A, B, C, D, state = (M.detach() for M in operands(2, 40, 6, 5, dtype=torch.float32))
    assert torch.equal(selective_scan(x, 0 * dt, A, B, C, D, state)[1], state)
    stepped = state.clone()
    selective_scan_step(x[:, 0], 0 * dt[:, 0], A, B[:, 0], C[:, 0], D, stepped)
    assert torch.equal(stepped, state)


@pytest.mark.parametrize("cut", [1, 16, 40, 99])
def test_selective_scan_two_segments_equal_one(cut):
    x, dt, A, B, C, D, state = operands(2, 100, 6, 5)
    whole = selective_scan(x, dt, A, B, C, D, state)
    first, carried = selective_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state)
    second, final = selective_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, carried)
    assert_close([torch.cat([first, second], 1), final], whole, 1e-13)


@pytest.mark.parametrize("with_D", [True, False])
def test_selective_scan_steps_equal_reference(with_D):
    x, dt, A, B, C, D, initial = (M.detach() for M in operands(2, 20, 6, 5, dtype=torch.float32))
    D = D if with_D else None
    expected = selective_scan_reference(x, dt, A, B, C, D, initial)
    state = initial.clone()
    y = torch.stack([selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(20)], 1)
    assert_close([y, state], expected, 1e-6)


def test_selective_scan_later_positions_have_exactly_zero_gradient():
    """Exactly zero, not a rounding error: padding after a sequence would pass it through every layer."""
    arguments = operands(2, 50, 6, 5, dtype=torch.float32)
    y, _ = selective_scan(*arguments)
    gradients = torch.autograd.grad(y[:, :30].square().sum(), arguments)
    for gradient in gradients[0], gradients[1], gradients[3], gradients[4]:
        assert gradient[:, :30].any() and not gradient[:, 30:].any()


def test_selective_scan_backward_stores_one_state_per_chunk():
    """Beside its inputs; all states would be N = 8 times x, those before chunks of 16 are half of x."""
    arguments = operands(2, 160, 32, 8, dtype=torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda M: kept.update({M.data_ptr(): M}) or M, lambda M: M):
        selective_scan(*arguments)
    inputs = {M.data_ptr() for M in arguments}
    assert sum(M.numel() for pointer, M in kept.items() if pointer not in inputs) <= arguments[0].numel() / 2


def test_selective_scan_rejects_mismatched_shapes():
    x, dt, A, B, C, D, state = operands(2, 10, 6, 5)
    with pytest.raises(ValueError, match=r"C has shape \(2, 9, 5\), expected \(2, 10, 5\)"):
        selective_scan(x, dt, A, B, C[:, :9], D, state)
    with pytest.raises(ValueError, match="dt has shape"):
        selective_scan(x, dt[..., :1], A, B, C, D, state)
    with pytest.raises(ValueError, match="initial_state has shape"):
        selective_scan(x, dt, A, B, C, D, state.mT)
    with pytest.raises(ValueError, match="T must be at least 1"):
        selective_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])


def test_selective_scan_flops_are_those_of_the_recurrence():
    """dt A, exp, dx B, two for h, two for y, at each of 30 states; dt x and D x at each channel."""
    assert selective_scan_flops(2, 3, 5) == 2 * (30 // 2 * 7 + 3 * 3)


def kernel_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What mamba_ssm's selective_scan_fn checks and computes, [B, D, T] in and out, without a state to start from."""
    assert all(M.dtype == torch.float32 for M in (u, delta, A, B, C)) and not return_last_state
    assert u.shape == delta.shape and B.shape == C.shape == (len(u), A.shape[1], u.shape[2]) and not delta_softplus
    with backend.use("portable"):
        return selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D)[0].mT


def kernel_step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """mamba_ssm's selective_state_update; it fails without D or dt_bias."""
    assert A.shape == state.shape[1:] and dt.shape == x.shape and D.shape == dt_bias.shape == x.shape[1:]
    assert B.dtype == C.dtype == x.dtype and not dt_bias.any() and not dt_softplus
    with backend.use("portable"):
        return selective_scan_step(x, dt, A, B, C, D, state)


@pytest.fixture
def with_kernels(monkeypatch):
    kernels = {"selective_scan": kernel_scan, "selective_scan_step": kernel_step}
    called = []

    def choose(name, device, unsupported=""):
        return None if unsupported or backend._chosen == "portable" else called.append(name) or kernels[name]

    monkeypatch.setattr(backend, "cuda_kernel", choose)
    return called


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("length", [1, 37])
def test_selective_scan_kernel_adapter_carries_states(with_kernels, with_state, length):
    """The adapter, without a GPU: values and gradients of both states, through a kernel that has neither."""
    arguments = operands(2, length, 6, 5, dtype=torch.float32)
    arguments[6] = arguments[6] if with_state else None
    exact = [None if a is None else a.detach().double().requires_grad_() for a in arguments]
    assert_close(results(selective_scan, arguments), results(selective_scan_reference, exact), 1e-5)
    assert with_kernels == ["selective_scan"]
    assert_close(selective_scan(*exact), selective_scan_reference(*exact), 1e-12)  # it has no float64


@pytest.mark.parametrize("with_D", [True, False])
def test_selective_scan_step_kernel_arguments(with_kernels, with_D):
    x, dt, A, B, C, D, initial = (M.detach() for M in operands(2, 1, 6, 5, dtype=torch.float32))
    D = D if with_D else None
    state = initial.clone()
    y = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    assert with_kernels == ["selective_scan_step"]
    assert_close([y[:, None], state], selective_scan_reference(x, dt, A, B, C, D, initial), 1e-6)


def test_selective_scan_kernels_are_looked_up_by_operation():
    arguments = [M.detach() for M in operands(1, 3, 2, 2)]
    x, dt, A, B, C, D, state = arguments
    with backend.use("cuda"):
        with pytest.raises(UserError, match="selective_scan got tensors on cpu"):
            selective_scan(*arguments)
        with pytest.raises(UserError, match="selective_scan_step got tensors on cpu"):
            selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    rows = {row.operation for row in backend.describe()}
    assert {"selective_scan", "selective_scan_step"} <= rows
    assert backend.KERNELS["selective_scan"].package == "mamba_ssm"


def test_selective_scan_imports_no_kernel_package():
    code = "import sys, ssmttm.ops.selective_scan; assert not {'mamba_ssm', 'selective_scan_cuda'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
