"""S4D against its sequential reference and against scipy: values, gradients, states, extremes; and its layer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal
from test_ops_ssd import QUICK, assert_close
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.errors import UserError
from ssmttm.mixers import S4D
from ssmttm.ops.s4d import (
    _fft_length,
    discretise,
    s4d,
    s4d_final_state,
    s4d_flops,
    s4d_outputs,
    s4d_reference,
    s4d_step,
)


def operands(batch, length, channels, modes, seed=0, dtype=torch.float64):
    """x, dt, A, C, D, initial_state, with steps from small to large and frequencies from slow to fast."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.exp(torch.rand(channels, generator=g) * 4.6 - 6.9)  # 0.001 to 0.1
    real, frequencies = -0.2 - torch.rand(channels, modes, generator=g), torch.arange(modes) * math.pi
    A = torch.complex(real.double(), frequencies.expand(channels, -1).double())
    C, state = torch.complex(*normal(2, channels, modes)), torch.complex(*normal(2, batch, channels, modes))
    arguments = [normal(batch, length, channels), dt, A, C, normal(channels), state]
    return [to(M, dtype) for M in arguments]


def to(M, dtype):
    """A leaf of its own in `dtype`, or in the complex type of its width."""
    accumulation = torch.promote_types(dtype, torch.complex64) if M.is_complex() else dtype
    return M.detach().to(accumulation).requires_grad_()


def results(function, arguments, **options):
    """y, the final state, and the gradients of a fixed random projection of both; complex ones as pairs."""
    outputs = function(*arguments, **options)
    g = torch.Generator().manual_seed(1)
    weights = [torch.complex(*torch.randn(2, *out.shape, generator=g)) for out in outputs]
    weights = [
        w.to(out.dtype) if out.is_complex() else w.real.to(out.dtype) for w, out in zip(weights, outputs, strict=True)
    ]
    gradients = torch.autograd.grad(outputs, [a for a in arguments if a is not None], weights)
    return [torch.view_as_real(M) if M.is_complex() else M for M in (*outputs, *gradients)]


@QUICK
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    with_state=st.booleans(),
    with_D=st.booleans(),
)
def test_s4d_equals_reference(batch, length, with_state, with_D):
    exact = operands(batch, length, 4, 5, seed=length)
    exact[4], exact[5] = exact[4] if with_D else None, exact[5] if with_state else None
    expected = results(s4d_reference, exact)
    assert_close(results(s4d, exact), expected, 1e-11)
    single = [None if a is None else to(a, torch.float32) for a in exact]
    found = results(s4d, single)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found, expected, 1e-4)  # the gradient of A loses digits in short sequences


@pytest.mark.parametrize("length", [1, 100, 257])
def test_s4d_bfloat16_is_close_to_reference(length):
    """Only x and y are rounded: the system and the state are float32."""
    single = operands(2, length, 4, 5, dtype=torch.float32)
    mixed = [to(single[0], torch.bfloat16), *single[1:]]
    y, state = s4d(*mixed)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.complex64
    exact = [to(a, torch.float64) for a in mixed]
    found, expected = results(s4d, mixed), results(s4d_reference, exact)
    assert_close(found, expected, 2e-2)
    assert_close(found[1:2], expected[1:2], 1e-6)


def test_s4d_ignores_autocast():
    arguments = operands(2, 100, 4, 5, dtype=torch.float32)
    expected = results(s4d, arguments)
    found = results(torch.autocast("cpu", torch.bfloat16)(s4d), arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_s4d_gradients_equal_finite_differences():
    arguments = operands(2, 7, 2, 3)
    assert torch.autograd.gradcheck(s4d, arguments)
    assert torch.autograd.gradcheck(lambda *a: s4d(*a, lengths=torch.tensor([0, 4]))[1], arguments)


def test_s4d_equals_scipy_simulation():
    """scipy discretises the real system of 2M states by a matrix exponential and steps through it."""
    x, dt, A, C, D, _ = (M.detach() for M in operands(1, 40, 3, 4))
    y, _ = s4d(x, dt, A, C, D)
    for channel in range(3):
        a, c = A[channel].numpy(), C[channel].numpy()
        rotations = [np.array([[z.real, -z.imag], [z.imag, z.real]]) for z in a]
        system = np.zeros((8, 8))
        for mode, block in enumerate(rotations):
            system[2 * mode : 2 * mode + 2, 2 * mode : 2 * mode + 2] = block
        input_gain = np.tile([1.0, 0.0], 4)[:, None]
        readout = 2 * np.stack([c.real, -c.imag], 1).reshape(1, 8)
        step = float(dt[channel])
        discrete = signal.cont2discrete((system, input_gain, readout, np.zeros((1, 1))), step, "zoh")
        # scipy reads the state before the input of the same step, we after it: one step earlier
        _, simulated, _ = signal.dlsim(discrete, np.append(x[0, :, channel].numpy(), 0.0))
        expected = torch.from_numpy(simulated[1:, 0].copy()) + D[channel] * x[0, :, channel]
        torch.testing.assert_close(y[0, :, channel], expected, rtol=0, atol=1e-11)
        assert expected.abs().max() > 0.1
        _, held, _ = signal.lsim(
            (system, input_gain, readout, 0.0),
            np.append(x[0, :, channel].numpy(), 0.0),
            np.arange(41) * step,
            interp=False,
        )
        np.testing.assert_allclose(held, simulated[:, 0], atol=1e-10)


def test_s4d_extreme_values_are_finite_and_exact():
    exact = operands(1, 4096, 4, 32)
    exact[1] = to(torch.tensor([1e-6, 1e-4, 0.1, 1.0]), torch.float64)
    single = [to(a, torch.float32) for a in exact]
    found = results(s4d, single)
    assert all(M.isfinite().all() for M in found)
    assert_close(found[:3], results(s4d_reference, [to(a, torch.float64) for a in single])[:3], 1e-4)
    decay, input_gain = discretise(*(single[i].detach() for i in (1, 2)))
    for a, b in zip((decay, input_gain), discretise(exact[1], exact[2]), strict=True):
        assert ((a - b).abs() / b.abs()).max() < 2e-5  # relative to each: none is lost where dt is small


@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_s4d_two_segments_equal_one(cut):
    x, *system, state = operands(2, 100, 4, 5)
    whole = s4d(x, *system, state)
    first, carried = s4d(x[:, :cut], *system, state)
    second, final = s4d(x[:, cut:], *system, carried)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(final, whole[1], rtol=0, atol=1e-12)


def test_s4d_final_state_is_taken_at_each_rows_length():
    x, dt, A, C, D, state = (M.detach() for M in operands(4, 50, 4, 5))
    lengths = torch.tensor([0, 1, 33, 50])
    x[torch.arange(50) >= lengths[:, None]] = torch.nan
    _, final = s4d(x, dt, A, C, D, state, lengths)
    assert torch.equal(final[0], state[0])
    for row in range(1, 4):
        _, expected = s4d_reference(x[row : row + 1, : lengths[row]], dt, A, C, D, state[row : row + 1])
        torch.testing.assert_close(final[row], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(s4d_final_state(x[3:], dt, A), s4d_reference(x[3:], dt, A, C)[1], rtol=0, atol=1e-12)


def test_s4d_steps_equal_reference():
    x, dt, A, C, D, initial = (M.detach() for M in operands(2, 20, 4, 5, dtype=torch.float32))
    expected, final = s4d_reference(x, dt, A, C, D, initial)
    state, discrete = initial.clone(), discretise(dt, A)
    y = torch.stack([s4d_step(column, *discrete, C, D, state) for column in x.unbind(1)], 1)
    assert_close([y, torch.view_as_real(state)], [expected, torch.view_as_real(final)], 1e-5)
    assert s4d_step(x[:, 0].bfloat16(), *discrete, C, D, state).dtype == torch.bfloat16


def test_s4d_rejects_mismatched_shapes():
    x, dt, A, C, D, state = operands(2, 10, 4, 5)
    with pytest.raises(ValueError, match="C has shape"):
        s4d(x, dt, A, C[:, :4], D, state)
    with pytest.raises(ValueError, match="initial_state has shape"):
        s4d(x, dt, A, C, D, state[:1])
    with pytest.raises(ValueError, match="T must be at least 1"):
        s4d(x[:, :0], dt, A, C, D, state)


def test_s4d_flops_equal_counted_flops():
    x, dt, A, C, D, _ = operands(1, 150, 4, 8)
    with FlopCounterMode(display=False) as counter:
        s4d_outputs(x, dt, A, C, D)
    ffts = s4d_flops(150, 4, 0)
    assert s4d_flops(150, 4, 16) - ffts == counter.get_total_flops()
    assert 4 * 7.5 * 300 * math.log2(300) < ffts < 1.2 * 4 * 7.5 * 300 * math.log2(300)


def test_s4d_fft_length_is_sufficient_and_smooth():
    for length in range(1, 5000):
        n = _fft_length(length)
        assert 2 * length - 1 <= n <= 2.5 * length
        for prime in (2, 3, 5, 7, 11, 13):
            while n % prime == 0:
                n //= prime
        assert n == 1


@pytest.mark.parametrize("expand", [1, 2])
def test_s4d_mixer_equals_paper(expand):
    """Its output from the recurrence written out for both halves of the conjugate pairs."""
    torch.manual_seed(0)
    layer = S4D(6, d_state=8, expand=expand).double()
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    u = layer.in_proj(x) if expand > 1 else x
    half = -torch.exp(layer.log_A_real) + 1j * layer.A_imag
    A = torch.cat([half, half.conj()], 1)  # [I, N]
    C = torch.cat([layer.C[..., 0] + 1j * layer.C[..., 1], layer.C[..., 0] - 1j * layer.C[..., 1]], 1)
    dt = layer.log_dt.exp()[:, None]
    state, outputs = torch.zeros(2, 6 * expand, 8, dtype=A.dtype), []
    for column in u.unbind(1):
        state = torch.exp(dt * A) * state + (torch.exp(dt * A) - 1) / A * column[..., None]
        outputs.append((C * state).sum(-1))
    y = torch.stack(outputs, 1)
    assert y.imag.abs().max() < 1e-12
    a, b = F.linear(F.gelu(y.real + layer.D * u), layer.out_proj.weight, layer.out_proj.bias).chunk(2, -1)
    torch.testing.assert_close(layer(x), a * torch.sigmoid(b), rtol=0, atol=1e-12)


def test_s4d_mixer_parameters_and_initial_values():
    layer = S4D(512, d_state=64)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "log_dt": (512,),
        "log_A_real": (512, 32),
        "A_imag": (512, 32),
        "C": (512, 32, 2),
        "D": (512,),
        "out_proj.weight": (1024, 512),
        "out_proj.bias": (1024,),
    }
    marked = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"log_dt", "log_A_real", "A_imag", "C", "D"}
    dt = layer.log_dt.exp()
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
    torch.testing.assert_close(layer.log_A_real.exp(), torch.full((512, 32), 0.5))
    assert torch.view_as_complex(layer.C.detach()).abs().square().mean().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(layer.A_imag[3], math.pi * torch.arange(32.0))
    inverse = S4D(4, d_state=64, init="inv").A_imag[1]
    torch.testing.assert_close(inverse[[0, 1, 31]], 64 / math.pi * torch.tensor([63.0, 64 / 3 - 1, 64 / 63 - 1]))
    assert S4D(8, expand=2).in_proj.weight.shape == (16, 8)


def test_s4d_mixer_steps_use_weights_of_last_forward():
    layer, x = S4D(4, d_state=8).double(), torch.randn(2, 9, 4, dtype=torch.float64)
    state = layer.init_state(2)
    layer.step(x[:, 0], state)
    with torch.no_grad():
        layer.log_dt.add_(0.5)
        fresh = layer.init_state(2)
        for s in (state, fresh):
            s.ssm_state.zero_()
            layer(x[:, :8], s)
        torch.testing.assert_close(layer.step(x[:, 8], state), layer(x)[:, 8], rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.step(x[:, 8], fresh), layer(x)[:, 8], rtol=0, atol=1e-12)


def test_s4d_mixer_rejects_invalid_options():
    with pytest.raises(UserError, match="d_state must be even, got 7"):
        S4D(4, d_state=7)
    with pytest.raises(UserError, match="unknown S4D init 'legs': choose from lin, inv"):
        S4D(4, init="legs")
    with pytest.raises(UserError, match="d_state"):
        S4D(4, d_state=0)
