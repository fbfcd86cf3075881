"""The adapters to the kernels of mamba_ssm and causal_conv1d, against the sequential references in float64."""

import math
from functools import partial

import pytest
import torch
from environment import adapters, on_cuda, unrounded_mamba3
from errors import assert_near, with_gradients

from ssmttm.errors import UserError
from ssmttm.ops import backend
from ssmttm.ops.conv import causal_conv, causal_conv_reference, causal_conv_step
from ssmttm.ops.mamba3 import mamba3_reference
from ssmttm.ops.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from ssmttm.ops.ssd import ssd, ssd_reference, ssd_step

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
NAMES = {FP32: "float32", BF16: "bfloat16"}


def double(operands):
    return {name: None if value is None else value.double() for name, value in operands.items()}


# --- SSD


def ssd_operands(b, t, h, p, g, n, dtype=FP32, D=True, initial=True, largest_dt=0.1):
    """x, B and C are slices of one tensor, as in the mixer."""
    x, B, C = torch.randn(b, t, h * p + 2 * g * n).to(dtype).split([h * p, g * n, g * n], -1)
    return {
        "x": x.unflatten(-1, (h, p)), "dt": torch.rand(b, t, h) * largest_dt, "A": -torch.rand(h) * 8 - 0.5,
        "B": B.unflatten(-1, (g, n)), "C": C.unflatten(-1, (g, n)), "D": torch.randn(h) if D else None,
        "initial_state": torch.randn(b, h, p, n) if initial else None,
    }  # fmt: skip


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    return {f"grad {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def named(function, **options):
    return lambda **operands: dict(zip(("y", "final_state"), function(**operands, **options), strict=True))


@pytest.mark.parametrize(
    ("sizes", "chunk", "tolerance"),
    [
        (dict(b=1, t=20, h=2, p=16, g=1, n=16), 16, 3e-6),
        (dict(b=2, t=20, h=2, p=16, g=2, n=16, initial=False), 16, 3e-6),
        (dict(b=1, t=1, h=2, p=64, g=1, n=16), 64, 3e-6),
        (dict(b=1, t=17, h=2, p=64, g=2, n=64, D=False), 16, 3e-6),
        (dict(b=1, t=18, h=1, p=64, g=1, n=512), 16, 3e-6),
        (dict(b=1, t=19, h=2, p=10, g=2, n=5), 12, 3e-6),
        (dict(b=1, t=37, h=1, p=16, g=1, n=16, largest_dt=10.0), 16, 3e-5),
        (dict(b=1, t=20, h=2, p=16, g=2, n=16, dtype=BF16), 16, 5e-2),
        (dict(b=1, t=18, h=1, p=64, g=1, n=128, dtype=BF16), 16, 5e-2),
    ],
)
def test_ssd_equals_reference(sizes, chunk, tolerance):
    operands = ssd_operands(**sizes)
    with adapters():
        found = with_gradients(named(ssd, chunk_size=chunk), operands)
    assert found["y"].dtype == operands["x"].dtype and found["final_state"].dtype == FP32
    expected = with_gradients(named(ssd_reference), double(operands))
    row = f"`ssd`, {NAMES[operands['x'].dtype]}{', dt up to 10' if 'largest_dt' in sizes else ''}"
    assert_near(row, found, expected, tolerance)


def test_ssd_gradients_of_a_part_and_of_a_plain_sum():
    """Positions that the loss does not see have none; a sum's gradients have stride 0."""
    operands = ssd_operands(1, 20, 1, 16, 1, 16)
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    with adapters():
        y, state = ssd(**leaves, chunk_size=16)
        part = gradients(y[:, :11].square().sum(), leaves)
        found = gradients(y.sum() + state.sum(), leaves)
    for name in "x", "dt", "B", "C":
        assert part[f"grad {name}"][:, :11].any() and not part[f"grad {name}"][:, 11:].any()
    exact = {name: value.detach().requires_grad_() for name, value in double(operands).items()}
    expected = gradients(sum(result.sum() for result in ssd_reference(**exact)), exact)
    assert_near("`ssd`, float32", found, expected, 3e-6)


def test_ssd_initial_state_may_be_overwritten_before_the_backward():
    operands = ssd_operands(1, 5, 1, 16, 1, 16)
    leaves = {name: value.clone().requires_grad_(name != "initial_state") for name, value in operands.items()}
    with adapters():
        y, state = ssd(**leaves, chunk_size=16)
        leaves["initial_state"].copy_(state.detach())
        found = torch.autograd.grad(y.square().sum(), [leaves["C"]])[0]
    C = operands["C"].double().requires_grad_()
    y, _ = ssd_reference(**double(operands) | {"C": C})
    expected = torch.autograd.grad(y.square().sum(), [C])[0]
    assert_near("`ssd`, float32", {"grad C": found}, {"grad C": expected}, 3e-6)


@pytest.mark.parametrize(
    ("g", "n", "p", "dtype", "D"),
    [
        (1, 16, 64, FP32, True),
        (2, 64, 16, FP32, False),
        (2, 5, 10, FP32, True),
        (1, 512, 64, FP32, True),
        (1, 128, 64, BF16, True),
    ],
)
def test_ssd_step_equals_portable(g, n, p, dtype, D):
    operands = ssd_operands(2, 1, 2, p, g, n, dtype, D)
    initial = operands.pop("initial_state")
    position = {name: value[:, 0] if name in ("x", "dt", "B", "C") else value for name, value in operands.items()}
    assert_step(ssd_step, position, initial, f"`ssd_step`, {NAMES[dtype]}", 1e-2 if dtype == BF16 else 1e-6)


def assert_step(step, position, initial, row, tolerance):
    """A step with the kernel updates the state in place, as the portable one does."""
    found, expected = {"state": initial.clone()}, {"state": initial.clone()}
    with adapters():
        found["y"] = step(**position, state=found["state"])
    expected["y"] = step(**position, state=expected["state"])
    assert not torch.equal(found["state"], initial) and found["y"].dtype == position["x"].dtype
    assert_near(row, found, expected, tolerance)


# --- selective scan


def scan_operands(t, width, n, dtype=FP32, initial=True):
    return {
        "x": torch.randn(2, t, width).to(dtype), "dt": torch.rand(2, t, width), "A": -torch.rand(width, n) * 8,
        "B": torch.randn(2, t, n).to(dtype), "C": torch.randn(2, t, n).to(dtype), "D": torch.randn(width),
        "initial_state": torch.randn(2, width, n) if initial else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("t", "initial", "dtype"), [(13, True, FP32), (5, False, FP32), (1, True, FP32), (5, True, BF16)]
)
def test_selective_scan_equals_reference(t, initial, dtype):
    operands = scan_operands(t, 8, 4, dtype, initial)
    with adapters():
        found = with_gradients(named(selective_scan), operands)
    expected = with_gradients(named(selective_scan_reference), double(operands))
    assert_near(f"`selective_scan` (arguments), {NAMES[dtype]}", found, expected, 2e-2 if dtype == BF16 else 3e-6)


@pytest.mark.parametrize(("width", "n", "dtype"), [(40, 16, FP32), (33, 5, FP32), (32, 16, BF16)])
def test_selective_scan_step_equals_portable(width, n, dtype):
    operands = scan_operands(1, width, n, dtype)
    initial = operands.pop("initial_state")
    position = {name: value[:, 0] if name in ("x", "dt", "B", "C") else value for name, value in operands.items()}
    position["D"] = position["D"] if n == 16 else None
    row, tolerance = f"`selective_scan_step`, {NAMES[dtype]}", 1e-2 if dtype == BF16 else 1e-6
    assert_step(selective_scan_step, position, initial, row, tolerance)


# --- convolution


@pytest.mark.parametrize(
    ("t", "taps", "initial", "lengths", "dtype"),
    [
        (9, 4, True, None, FP32),
        (9, 2, False, [3, 9], FP32),
        (1, 4, True, None, FP32),
        (9, 4, True, None, BF16),
    ],
)
def test_convolution_equals_reference(t, taps, initial, lengths, dtype):
    operands = {
        "x": torch.randn(2, t, 16).to(dtype), "weight": torch.randn(16, taps), "bias": torch.randn(16),
        "initial_state": torch.randn(2, 16, taps - 1).to(dtype) if initial else None,
    }  # fmt: skip
    lengths = None if lengths is None else torch.tensor(lengths)

    def convolve(function, **options):
        return lambda **given: {"y": function(**given, activation="silu", **options)[0]}

    with adapters():
        found = with_gradients(convolve(causal_conv, lengths=lengths), operands)
    expected = with_gradients(convolve(causal_conv_reference), double(operands))
    assert_near(f"`causal_conv` (arguments), {NAMES[dtype]}", found, expected, 1e-2 if dtype == BF16 else 1e-6)


@pytest.mark.parametrize(("dtype", "state_dtype"), [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, BF16)])
def test_convolution_step_equals_portable(dtype, state_dtype):
    position = {"x": torch.randn(2, 12).to(dtype), "weight": torch.randn(12, 4), "bias": torch.randn(12)}
    initial = torch.randn(2, 3, 12).to(state_dtype).mT
    tolerance = 1e-6 if dtype == state_dtype == FP32 else 1e-2
    assert_step(
        partial(causal_conv_step, activation="silu"),
        position,
        initial,
        f"`causal_conv_step` (arguments), {NAMES[dtype]}",
        tolerance,
    )


def test_convolution_of_bfloat16_keeps_its_float32_weight():
    x, weight = torch.full((1, 1, 8), 2.0**-9, dtype=BF16), torch.full((8, 4), 1 + 2**-10)
    with adapters():
        y, _ = causal_conv(x, weight, torch.full((8,), -(2.0**-9)))
    assert torch.equal(y, torch.full_like(y, 2.0**-19))  # 0 if the weight were rounded


# --- operands that a kernel does not take


def conv_of(channels, taps, dtype=FP32):
    x, weight, bias = torch.randn(1, 5, channels, dtype=dtype), torch.randn(channels, taps, dtype=dtype), None
    return lambda: causal_conv(x, weight, bias)


def conv_step_of(taps, dtype=FP32):
    x, weight, state = (torch.randn(*shape, dtype=dtype) for shape in ((1, 8), (8, taps), (1, 8, taps - 1)))
    return lambda: (causal_conv_step(x, weight, None, state.clone()),)


def ssd_of_float64():
    operands = double(ssd_operands(1, 5, 1, 16, 1, 16))
    return lambda: ssd(**operands)


def ssd_step_of_float64():
    x, dt, A, B, C, D, state = double(ssd_operands(1, 1, 1, 16, 1, 16)).values()
    return lambda: (ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state.clone()),)


def selective_scan_of(n, dtype=FP32):
    operands = {name: value.to(dtype) for name, value in scan_operands(2, 8, n).items()}
    return lambda: selective_scan(**operands)


def selective_scan_step_of_float64():
    x, dt, A, B, C, D, state = double(scan_operands(1, 8, 4)).values()
    return lambda: (selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state.clone()),)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (conv_of(12, 4), "12 channels"),
        (conv_of(16, 5), "d_conv 5"),
        (conv_of(16, 1), "d_conv 1"),
        (conv_of(16, 4, FP64), "float64"),
        (conv_step_of(5), "d_conv 5"),
        (conv_step_of(4, FP64), "float64"),
        (ssd_of_float64(), "float64"),
        (ssd_step_of_float64(), "float64"),
        (selective_scan_of(257), "d_state 257"),
        (selective_scan_of(4, FP64), "float64"),
        (selective_scan_step_of_float64(), "float64"),
    ],
)
def test_what_a_kernel_does_not_take_runs_portably_unless_it_was_demanded(run, reason):
    expected = run()
    with adapters():
        for found, wanted in zip(run(), expected, strict=True):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype
        with backend.use("cuda"), pytest.raises(UserError, match=f"does not take {reason}"):
            run()


# --- Mamba-3, whose kernel ssmttm does not use


@pytest.mark.parametrize(("t", "initial"), [(20, True), (12, False), (1, True)])
def test_mamba3_reference_equals_the_kernel_without_its_rounding(t, initial):
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    h, p, n, r = 2, 16, 16, 4
    x, B, C, angle, trap = (torch.randn(1, t, *shape) for shape in ((h, p), (h, n), (h, n), (r,), (h,)))
    shapes = {"angle_state": (h, r), "ssm_state": (h, p, n), "k_state": (h, n), "v_state": (h, p)}
    states = {name: torch.randn(1, *shape) for name, shape in shapes.items()} if initial else {}
    operands = {"x": x, "dt": torch.rand(1, t, h) * 0.1, "A": -torch.rand(1, t, h) * 8, "B": B, "C": C, "trap": trap,
                "angle": angle, "D": torch.randn(h), **states}  # fmt: skip
    weights = {"y": torch.randn(1, t, h, p), **{name: torch.randn(1, *shape) for name, shape in shapes.items()}}

    def kernel(x, dt, A, B, C, trap, angle, D, **states):
        rates, bias = angle[:, :, None].expand(-1, -1, h, -1), torch.zeros(h, n)
        y, *after = mamba3_siso_combined(
            C, B, x, (A * dt).mT, dt.mT, trap.mT, bias, bias, rates, D, Input_States=[*states.values()] or None,
            chunk_size=16, return_final_states=True,
        )  # fmt: skip
        return {"y": y, **dict(zip(shapes, after, strict=True))}

    def reference(x, dt, A, B, C, trap, angle, D, **states):
        before = tuple(states.values()) or None
        y, after = mamba3_reference(x, dt, A, B, C, trap.sigmoid(), math.pi * angle.tanh(), D, before)
        return {"y": y, **dict(zip(shapes, after, strict=True))}

    with on_cuda(), unrounded_mamba3():
        found = with_gradients(kernel, operands, weights)
    expected = with_gradients(reference, operands, weights)
    for results in found, expected:  # angles from 0 to 2 pi, or from -pi to pi
        results["angle_state"] = torch.view_as_real(torch.polar(torch.ones(()), results["angle_state"]))
    assert_near("`mamba3_siso_combined`, without its rounding", found, expected, 1e-5)
