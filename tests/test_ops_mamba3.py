"""Mamba-3's scan against its reference and against what the paper derives it from, and the mixer's parameters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ops_ssd import QUICK, assert_close
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.errors import UserError
from ssmttm.mixers.mamba3 import Mamba3
from ssmttm.ops.mamba3 import mamba3, mamba3_flops, mamba3_reference, mamba3_step
from ssmttm.ops.ssd import ssd_reference

NARROW = {0, 3, 4}  # x, B and C may be bfloat16; the rest is float32 whatever they are


def operands(batch, length, heads=4, width=8, n=6, angles=2, seed=0, dtype=torch.float64):
    """x, dt, A, B, C, trap, rate, D and the four tensors of a state, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, B, C = normal(batch, length, heads, width), normal(batch, length, heads, n), normal(batch, length, heads, n)
    dt = torch.exp(torch.rand(batch, length, heads, generator=g) * 4.6 - 6.9)  # 0.001 to 0.1
    A, trap = -torch.exp(1.5 * normal(batch, length, heads)), normal(batch, length, heads).sigmoid()
    rate = math.pi * normal(batch, length, angles).tanh()
    state = normal(batch, heads, angles), normal(batch, heads, width, n), normal(batch, heads, n)
    arguments = x, dt, A, B, C, trap, rate, normal(heads), *state, normal(batch, heads, width)
    return [M.to(dtype).requires_grad_() for M in arguments]


def results(function, arguments, with_state=True, with_D=True, **options):
    """y, the final state, and the gradients of a fixed random projection of them."""
    *inputs, D = arguments[:8]
    state = tuple(arguments[8:]) if with_state else None
    y, final = function(*inputs, D if with_D else None, state, **options)
    outputs, g = [y, *final], torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=g).to(out.dtype) for out in outputs]
    used = inputs + [D] * with_D + arguments[8:] * with_state
    return [*outputs, *torch.autograd.grad(outputs, used, weights)]


def at(arguments, t):
    """The operands of one position, for the step."""
    *inputs, D = (M.detach() for M in arguments[:8])
    return [*(M[:, t] for M in inputs), D]


@QUICK
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    chunk=st.integers(1, 64),
    angles=st.integers(1, 3),
    with_state=st.booleans(),
    with_D=st.booleans(),
    with_lengths=st.booleans(),
)
def test_mamba3_equals_reference(batch, length, chunk, angles, with_state, with_D, with_lengths):
    exact = operands(batch, length, angles=angles, seed=length)
    lengths = torch.tensor([0, length, length // 2])[:batch] if with_lengths else None
    options = {"with_state": with_state, "with_D": with_D, "lengths": lengths}
    expected = results(mamba3_reference, exact, **options)
    assert_close(results(mamba3, exact, **options, chunk_size=chunk), expected, 1e-11)
    single = [a.detach().float().requires_grad_() for a in exact]
    assert_close(results(mamba3, single, **options, chunk_size=chunk), expected, 3e-5)


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (100, 32), (257, 64)])
def test_mamba3_bfloat16_is_close_to_reference(length, chunk):
    """Also with decays so slow that rounding must not reach the gradient of A divided by A."""
    for slowness in (1, 1e-3):
        rounded = operands(2, length, width=16, n=16, angles=4, dtype=torch.bfloat16)
        mixed = [a.detach() if i in NARROW else a.detach().float() for i, a in enumerate(rounded)]
        mixed[2] *= slowness
        mixed = [a.requires_grad_() for a in mixed]
        y, state = mamba3(*mixed[:8], tuple(mixed[8:]))
        assert y.dtype == torch.bfloat16 and {M.dtype for M in state} == {torch.float32}
        expected = results(mamba3_reference, [a.detach().double().requires_grad_() for a in mixed])
        assert_close(results(mamba3, mixed, chunk_size=chunk), expected, 2e-2)


def test_mamba3_ignores_autocast():
    arguments = operands(2, 40, dtype=torch.float32)
    expected, state = mamba3(*arguments[:8], tuple(arguments[8:]))
    with torch.autocast("cpu", torch.bfloat16):
        found, final = mamba3(*arguments[:8], tuple(arguments[8:]))
    assert_close([found, *final], [expected, *state], 1e-6)


def test_mamba3_gradients_equal_finite_differences():
    arguments = operands(1, 5, heads=2, width=2, n=4, angles=1)
    assert torch.autograd.gradcheck(lambda *a: mamba3(*a[:8], tuple(a[8:]), chunk_size=2)[0], arguments)


@pytest.mark.parametrize(("dt", "A"), [(0.1, -100.0), (0.1, -1e-4), (1e-9, -1e-4), (1e-30, -1e-4), (0.0, -1.0)])
def test_mamba3_extreme_values_are_finite_and_exact(dt, A):
    arguments = operands(1, 2000, heads=2, width=4, n=4, angles=2, dtype=torch.float32)
    arguments[1] = torch.where(torch.rand(arguments[1].shape) < 0.5, dt, arguments[1].detach()).requires_grad_()
    arguments[2] = torch.full_like(arguments[2], A).requires_grad_()
    found = results(mamba3, arguments)
    assert all(M.isfinite().all() for M in found)
    exact = [a.detach().double().requires_grad_() for a in arguments]
    assert_close(found, results(mamba3, exact, chunk_size=16), 2e-4)


@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_mamba3_two_segments_equal_one(cut):
    arguments = operands(2, 100)
    whole_y, whole = mamba3(*arguments[:8], tuple(arguments[8:]))
    *inputs, D = arguments[:8]
    first, carried = mamba3(*(M[:, :cut] for M in inputs), D, tuple(arguments[8:]))
    second, final = mamba3(*(M[:, cut:] for M in inputs), D, carried)
    assert_close([torch.cat([first, second], 1), *final], [whole_y, *whole], 1e-12)


def test_mamba3_steps_equal_reference():
    arguments = operands(2, 200, dtype=torch.float32)
    arguments[1] = arguments[1] * 20  # many rotations
    expected, final = mamba3_reference(*arguments[:8], tuple(arguments[8:]))
    state = tuple(M.detach().clone() for M in arguments[8:])
    y = torch.stack([mamba3_step(*at(arguments, t), state) for t in range(200)], 1)
    assert_close([y, *state], [expected, *final], 2e-5)
    assert state[0].abs().max() < math.pi + 1e-6


@pytest.mark.parametrize("scale", [1, 40])
def test_mamba3_angles_lose_no_precision_over_long_sequences(scale):
    """Thousands of radians: the error is of the reference's size, and prefill agrees with steps from there."""
    arguments = [M.detach() for M in operands(1, 6000, heads=2, n=8, angles=2, dtype=torch.float32)[:8]]
    arguments[1] = arguments[1] * scale  # dt up to 4
    arguments[2], arguments[6] = arguments[2] / scale, arguments[6].abs()  # all turns in one direction
    exact, (exact_angle, *_) = mamba3_reference(*(M.double() for M in arguments))
    expected, state = mamba3_reference(*arguments)
    found, (angle, *rest) = mamba3(*arguments)

    def distance(y, angle):
        turned = torch.polar(torch.ones_like(exact_angle), angle.double() - exact_angle)
        return max((y - exact).abs().max() / exact.abs().max(), (turned - 1).abs().max())

    assert distance(found, angle) < 2 * distance(expected, state[0]) + 1e-6
    assert angle.abs().max() < math.pi + 1e-6 and {M.dtype for M in (found, angle, *rest)} == {torch.float32}


def test_mamba3_gradients_keep_precision_over_long_sequences():
    exact = operands(1, 3000, heads=2, n=4, angles=1)
    exact[1] = (exact[1].detach() * 40).requires_grad_()
    exact[2], exact[6] = (exact[2].detach() / 40).requires_grad_(), exact[6].detach().abs().requires_grad_()
    single = [a.detach().float().requires_grad_() for a in exact]
    expected = results(mamba3, exact)
    assert_close(results(mamba3, single), expected, 3e-5)
    assert all(M.isfinite().all() for M in results(mamba3, single))


def test_mamba3_final_state_is_taken_at_each_rows_length():
    *inputs, D = (M.detach() for M in operands(3, 30)[:8])
    state = tuple(M.detach() for M in operands(3, 30)[8:])
    lengths = torch.tensor([0, 1, 17])
    y, final = mamba3(*inputs, D, state, lengths, chunk_size=8)
    assert all(torch.equal(after[0], before[0]) for after, before in zip(final, state, strict=True))
    for row in (1, 2):
        alone = mamba3(*(M[row, None, : lengths[row]] for M in inputs), D, tuple(M[row, None] for M in state))
        assert_close([y[row, None, : lengths[row]], *(M[row, None] for M in final)], [alone[0], *alone[1]], 1e-12)


def test_mamba3_without_trapezoid_and_rotation_equals_ssd():
    x, dt, A, B, C, trap, rate, D = operands(2, 50)[:8]
    A = A[:, :1].detach().expand_as(A)[:1].expand_as(A)  # a decay for each head
    found, state = mamba3(x, dt, A, B, C, torch.ones_like(trap), torch.zeros_like(rate), D)
    assert_close([found, state[1]], ssd_reference(x, dt, A[0, 0], B, C, D), 1e-12)


def test_mamba3_rotation_equals_complex_decay():
    """Proposition 4: a state of complex numbers with the decay exp(dt * (A - i * rate)); y reads its real part."""
    x, dt, A, B, C, trap, rate = operands(2, 60, n=6, angles=3)[:7]
    b, c = (torch.view_as_complex(M.detach().unflatten(-1, (3, 2))) for M in (B, C))
    state, previous_input, outputs = torch.zeros(2, 4, 8, 3, dtype=torch.complex128), 0, []
    for t in range(60):
        decay = torch.exp(dt[:, t, :, None] * torch.complex(A[:, t, :, None].expand(-1, -1, 3), -rate[:, t, None]))
        start = dt[:, t] * (1 - trap[:, t])
        state = decay[:, :, None] * (state + start[..., None, None] * previous_input)
        previous_input = x[:, t, ..., None] * b[:, t, :, None]
        state = state + (dt[:, t] * trap[:, t])[..., None, None] * previous_input
        outputs.append((state * c[:, t, :, None].conj()).sum(-1).real)
    assert_close([mamba3(x, dt, A, B, C, trap, rate)[0]], [torch.stack(outputs, 1)], 1e-12)


@pytest.mark.parametrize(("trap", "order"), [(0.5, 2), (1.0, 1)])
def test_mamba3_trapezoid_has_second_order_error(trap, order):
    """Proposition 1: for h' = -h + cos(s), halving the interval divides the error by 2 to the order."""
    errors = []
    for steps in (100, 200):
        dt = torch.full((1, steps, 1), 2.0 / steps, dtype=torch.float64)
        ones = torch.ones(1, steps, 1, 2, dtype=torch.float64) / math.sqrt(2)  # B C = 1
        s = dt.cumsum(1)
        start = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 2), ones[:, 0], torch.ones(1, 1, 1)  # cos(0)
        y, _ = mamba3(s.cos()[..., None], dt, -torch.ones_like(dt), ones, ones, trap + 0 * dt, 0 * dt, None, start)
        errors.append(abs(y[0, -1, 0, 0].item() - (math.cos(2) + math.sin(2) - math.exp(-2)) / 2))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.03)


def test_mamba3_later_positions_have_exactly_zero_gradient():
    arguments = operands(2, 50, dtype=torch.float32)
    y, _ = mamba3(*arguments[:8], chunk_size=16)
    for gradient in torch.autograd.grad(y[:, :30].square().sum(), arguments[:7]):
        assert gradient[:, :30].any() and not gradient[:, 30:].any()


def test_mamba3_rejects_mismatched_shapes():
    x, dt, A, B, C, trap, rate, D, *state = operands(2, 10)
    with pytest.raises(ValueError, match="A has shape"):
        mamba3(x, dt, A[0, 0], B, C, trap, rate)
    with pytest.raises(ValueError, match="B has shape"):
        mamba3(x, dt, A, B[:, :, :1], C, trap, rate)
    with pytest.raises(ValueError, match="R at most N/2"):
        mamba3(x, dt, A, B, C, trap, rate.repeat(1, 1, 2))
    with pytest.raises(ValueError, match="v has shape"):
        mamba3(x, dt, A, B, C, trap, rate, D, tuple(state[:3] + state[2:3]))


def test_mamba3_flops_equal_counted_flops():
    arguments = operands(1, 150)
    with FlopCounterMode(display=False) as counter:
        mamba3(*arguments[:8], chunk_size=32)
    assert mamba3_flops(150, 4, 8, 6, chunk_size=32) == counter.get_total_flops()


def test_mamba3_mixer_has_mamba_ssm_parameters():
    """Names and shapes of mamba_ssm.modules.mamba3.Mamba3(1024, is_outproj_norm=True); 6,695,232 parameters in all."""
    with torch.device("meta"):
        mixer = Mamba3(1024, is_outproj_norm=True)
        plain = Mamba3(1024)
    expected = {
        "dt_bias": (32,),
        "B_bias": (32, 1, 128),
        "C_bias": (32, 1, 128),
        "D": (32,),
        "in_proj.weight": (2 * 2048 + 2 * 128 + 3 * 32 + 32, 1024),
        "B_norm.weight": (128,),
        "C_norm.weight": (128,),
        "norm.weight": (2048,),
        "out_proj.weight": (1024, 2048),
    }
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == expected
    assert sum(p.numel() for p in mixer.parameters()) == 6_695_232
    assert set(plain.state_dict()) == set(expected) - {"norm.weight"}
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "B_bias", "C_bias", "D"}


def test_mamba3_mixer_initial_values_are_mamba_ssms():
    mixer = Mamba3(1024, headdim=4, is_outproj_norm=True)  # 512 heads: enough to see the distribution
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 < dt.min() < 1.3e-3 and 0.08 < dt.max() < 0.101
    assert (dt.log().mean() - (math.log(1e-3) + math.log(0.1)) / 2).abs() < 0.3
    ones = mixer.D, mixer.B_bias, mixer.C_bias, mixer.B_norm.weight, mixer.C_norm.weight, mixer.norm.weight
    assert all((M == 1).all() for M in ones)


def test_mamba3_mixer_rejects_invalid_sizes():
    with pytest.raises(UserError, match=r"headdim must divide expand \* d_model = 32, got 5"):
        Mamba3(16, headdim=5)
    with pytest.raises(UserError, match="ngroups must divide the number of heads = 4, got 3"):
        Mamba3(16, headdim=8, ngroups=3)
    with pytest.raises(UserError, match=r"rope_fraction must be 0.5 or 1, got 0.25"):
        Mamba3(16, headdim=8, rope_fraction=0.25)
    with pytest.raises(UserError, match="ngroups must be at least 1, got 0"):
        Mamba3(16, headdim=8, ngroups=0)
    for d_state in (2, 7):
        with pytest.raises(UserError, match=f"d_state must be even .*got {d_state}"):
            Mamba3(16, headdim=8, d_state=d_state)


@pytest.mark.parametrize("is_outproj_norm", [False, True])
def test_mamba3_mixer_operands_equal_mamba_ssms(is_outproj_norm):
    """Written out for 4 heads of 8, 2 groups, 6 states: the projection's order, norms, biases, squashings, gate."""
    torch.manual_seed(0)
    mixer = Mamba3(16, d_state=6, headdim=8, ngroups=2, is_outproj_norm=is_outproj_norm).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.randn(2, 21, 16, dtype=torch.float64)
    z, x, B, C, dt, A, trap, angle = (u @ mixer.in_proj.weight.T).split([32, 32, 12, 12, 4, 4, 4, 1], -1)

    def normed(M, width):
        M = M.unflatten(-1, (-1, width))
        return M / (M.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    B = (normed(B, 6) * mixer.B_norm.weight).repeat_interleave(2, 2) + mixer.B_bias[:, 0]
    C = (normed(C, 6) * mixer.C_norm.weight).repeat_interleave(2, 2) + mixer.C_bias[:, 0]
    dt, A = (dt + mixer.dt_bias).exp().log1p(), -A.exp().log1p()
    rate = math.pi * angle.tanh()
    y, _ = mamba3_reference(x.unflatten(-1, (4, 8)), dt, A, B, C, 1 / (1 + (-trap).exp()), rate, mixer.D)
    y = normed(y.flatten(2), 8).flatten(2) * mixer.norm.weight if is_outproj_norm else y.flatten(2)
    expected = (y * z / (1 + (-z).exp())) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(u), expected, rtol=0, atol=1e-12)


def test_mamba3_mixer_keeps_dt_decay_and_angles_in_float32(monkeypatch):
    given = []

    def scan(*operands):
        given.extend(M.dtype for M in operands[:7])
        return mamba3(*operands)

    monkeypatch.setattr(Mamba3, "operations", {"scan": scan})
    Mamba3(16, d_state=8, headdim=8).bfloat16()(torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert given == [torch.bfloat16] + [torch.float32] * 6


def test_mamba3_mixer_decay_is_at_least_A_floor():
    """A very negative projection would stop the clock of the decay; the floor holds it at exp(-dt * A_floor)."""
    mixer = Mamba3(16, d_state=8, headdim=8, A_floor=0.5).double()
    with torch.no_grad():
        mixer.in_proj.weight[:, :].mul_(0)
        mixer.in_proj.weight[-2 - 2 * 4 : -2 - 4, 0] = -1000  # A, of the last rows: dt, A, trap [4], angle [2]
    state = mixer.init_state(1)
    state.ssm_state.fill_(1)
    mixer(torch.eye(16, dtype=torch.float64)[None, :1], state)
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    torch.testing.assert_close(state.ssm_state[0, :, 0, 0], torch.exp(-0.5 * dt), rtol=1e-12, atol=0)
