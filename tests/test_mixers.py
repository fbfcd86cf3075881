"""Every mixer: forward, steps, states and masks agree; some equal transformers' and load mamba_ssm's names."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssmttm.errors import UserError
from ssmttm.mixers import MIXERS, Mamba1, Mamba2, build_mixer, mamba1
from ssmttm.ops.s4d import s4d_flops
from ssmttm.ops.selective_scan import selective_scan_flops

OPTIONS = {
    "mamba1": [{}, {"dt_rank": 3, "d_conv": 3, "conv_bias": False, "bias": True}],
    "mamba2": [{"ngroups": 1}, {"ngroups": 2, "d_conv": 3}],
    "mamba3": [{}, {"ngroups": 2, "rope_fraction": 1.0, "is_outproj_norm": True}],
    "s4d": [{"expand": 1, "bias": False}, {"expand": 2, "init": "inv"}],
    "attention": [{"n_heads": 2}, {"n_heads": 4, "rotary": True, "bias": True, "out_bias": True}],
}
CASES = [pytest.param(name, options, id=f"{name}-{i}") for name in MIXERS for i, options in enumerate(OPTIONS[name])]
T = 37


# Forward FLOPs of 100 positions that are no matrix product to the counter.
UNCOUNTED = {
    "mamba1": lambda mixer: (
        100 * 2 * mixer.conv1d.weight.numel()
        + selective_scan_flops(100, 32, 8)
        - 2 * 100 * 32 * 8  # the states are read by a matrix product
    ),
    "mamba2": lambda mixer: 100 * 2 * mixer.conv1d.weight.numel(),
    "mamba3": lambda mixer: 0,
    "s4d": lambda mixer: s4d_flops(100, mixer.d_inner, 0),  # the FFTs
    "attention": lambda mixer: 2 * 100 * 101 * mixer.d_model,  # the scores, in float64 on a CPU
}


def tensors(state):
    return [value for value in vars(state).values() if isinstance(value, torch.Tensor)]


def make(name, options, dtype=torch.float64):
    """A small mixer whose every parameter matters, and an input [3, T, 16]."""
    torch.manual_seed(0)
    mixer = build_mixer(name, 16, d_state=8, headdim=8, chunk_size=8, **options).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(3, T, 16, dtype=dtype)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_forward_equals_prefill_and_steps_at_every_split(name, options):
    mixer, x = make(name, options)
    expected = mixer(x)
    with torch.no_grad():
        for split in range(T + 1):
            state = mixer.init_state(3)
            parts = [mixer(x[:, :split], state)] if split else []
            parts += [mixer.step(x[:, t], state)[:, None] for t in range(split, T)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_two_forwards_with_state_equal_one(name, options):
    mixer, x = make(name, options)
    state, whole = mixer.init_state(3), mixer.init_state(3)
    expected = mixer(x, whole)
    for cut in (1, 2, 20):
        state = mixer.init_state(3)
        found = torch.cat([mixer(x[:, :cut], state), mixer(x[:, cut:], state)], 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for a, b in zip(tensors(state), tensors(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in tensors(state))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_masked_positions_change_nothing(name, options):
    """Holes anywhere, whatever stands in them: outputs, gradients and states are those of the valid positions alone."""
    mixer, x = make(name, options)
    mask = torch.rand(3, T, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[2] = False
    mask[2, 11] = True  # fewer positions than the convolution has taps
    x = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    state = mixer.init_state(3)
    warm_up = torch.randn(3, 5, 16, dtype=x.dtype)
    mixer(warm_up, state)
    y = mixer(x, state, mask)
    y.square().sum().backward()
    assert (y[~mask] == 0).all() and (x.grad[~mask] == 0).all() and x.grad[mask].abs().min() > 0
    for row in range(3):
        alone = mixer.init_state(1)
        mixer(warm_up[row : row + 1], alone)
        expected = mixer(x[row : row + 1, mask[row]].detach(), alone)
        torch.testing.assert_close(y[row, mask[row]], expected[0], rtol=0, atol=1e-12)
        for a, b in zip(tensors(state), tensors(alone), strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_row_without_valid_position_keeps_state(name, options):
    mixer, x = make(name, options)
    state = mixer.init_state(3)
    mixer(x, state)
    before = state.clone()
    mixer(x, state, torch.zeros(3, T, dtype=torch.bool))
    for a, b in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_rows_written_into_larger_state_continue_as_alone(name, options):
    """Rows of different lengths; the second write replaces a row that had gone further."""
    mixer, x = make(name, options)
    with torch.no_grad():
        whole, parts = mixer.init_state(6), [mixer.init_state(3) for _ in range(2)]
        mixer(torch.randn(6, 70, 16, dtype=x.dtype), whole)
        for index, (part, cut) in enumerate(zip(parts, (20, 4), strict=True)):
            mixer(x[:, :cut], part)
            whole.write_rows(slice(index, 6, 2), part)
        parts[0] = parts[0].clone()
        mixer(x, parts[0].clone())  # a clone shares nothing
        for t in range(20, T):
            y = mixer.step(x[:, t].repeat_interleave(2, 0), whole)
            for index, part in enumerate(parts):
                torch.testing.assert_close(y[index::2], mixer.step(x[:, t], part), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_autocast_keeps_recurrence_in_float32(name, options):
    mixer, x = make(name, options, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = mixer.init_state(3, dtype=torch.bfloat16)
        y = mixer(x, state)
        stepped = mixer.init_state(3, dtype=torch.bfloat16)
        steps = torch.stack([mixer.step(x[:, t], stepped) for t in range(T)], 1)
    assert y.dtype == torch.bfloat16
    if hasattr(state, "ssm_state"):
        assert state.ssm_state.real.dtype == torch.float32
    scale = mixer(x).abs().max()
    assert (y - mixer(x)).abs().max() < 0.03 * scale and (steps - y).abs().max() < 0.03 * scale
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_cast_to_bfloat16_runs(name, options):
    mixer, x = make(name, options, torch.float32)
    expected, scale = mixer(x), mixer(x).abs().max()
    mixer, x = mixer.bfloat16(), x.bfloat16()
    state = mixer.init_state(3)
    assert (mixer(x, state) - expected).abs().max() < 0.05 * scale
    if hasattr(state, "ssm_state"):
        assert state.ssm_state.real.dtype == torch.float32
    assert mixer.step(x[:, 0], state).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_flops_equal_counted_flops(name, options):
    mixer, _ = make(name, options)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, 100, 16, dtype=torch.float64))
    assert mixer.flops(100) - UNCOUNTED[name](mixer) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixer_rejects_state_of_another_batch_size(name, options):
    mixer, x = make(name, options)
    with pytest.raises(UserError, match=r"the state has batch size 2, the input 3: call init_state\(3\)"):
        mixer(x, mixer.init_state(2))
    with pytest.raises(UserError, match="batch size 2"):
        mixer.step(x[:, 0], mixer.init_state(2))


def test_mixer_rejects_invalid_sizes():
    with pytest.raises(UserError, match=r"headdim must divide expand \* d_model = 32, got 5"):
        Mamba2(16, headdim=5)
    with pytest.raises(UserError, match="ngroups must divide the number of heads = 4, got 3"):
        Mamba2(16, headdim=8, ngroups=3)
    with pytest.raises(UserError, match="dt_rank must be at least 1, got 0"):
        Mamba1(16, dt_rank=0)
    with pytest.raises(UserError, match="unknown layer 'lstm'"):
        build_mixer("lstm", 16)


def test_mamba2_has_mamba_ssm_parameters():
    """Names and shapes of mamba_ssm.modules.mamba2.Mamba2(1024, d_state=512); 7,390,304 parameters in all."""
    with torch.device("meta"):
        mixer = Mamba2(1024, d_state=512)
    expected = {
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "in_proj.weight": (2 * 2048 + 2 * 512 + 32, 1024),
        "conv1d.weight": (2048 + 2 * 512, 1, 4),
        "conv1d.bias": (2048 + 2 * 512,),
        "norm.weight": (2048,),
        "out_proj.weight": (1024, 2048),
    }
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == expected
    assert sum(p.numel() for p in mixer.parameters()) == 7_390_304
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "A_log", "D"}


def test_mamba2_initial_values_are_mamba_ssms():
    mixer = Mamba2(1024, headdim=4)  # 512 heads: enough to see the distributions
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and (A.mean() - 8.5).abs() < 1
    assert 0.99e-3 < dt.min() < 1.3e-3 and 0.08 < dt.max() < 0.101
    assert (dt.log().mean() - (math.log(1e-3) + math.log(0.1)) / 2).abs() < 0.3
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_transformers(groups):
    """The independent reference: a two-layer Mamba2ForCausalLM, its mixers exchanged for ours with copied weights."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=50, hidden_size=16, state_size=8, num_hidden_layers=2, expand=2, head_dim=8, num_heads=4,
        n_groups=groups, conv_kernel=4, chunk_size=8,
    )  # fmt: skip
    reference = Mamba2ForCausalLM(config).double().eval()
    ids = torch.randint(50, (2, T))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = reference(ids, use_cache=False).logits
        x = reference.backbone.embeddings(ids)
        for layer in reference.backbone.layers:
            mixer = Mamba2(16, d_state=8, headdim=8, ngroups=groups, chunk_size=16).double()
            mixer.load_state_dict(layer.mixer.state_dict())
            mixer.norm.eps = config.layer_norm_epsilon
            x = x + mixer(layer.norm(x))
        logits = reference.lm_head(reference.backbone.norm_f(x))
    torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=2e-6)  # transformers rounds to float32
    assert expected.abs().max() > 0.1


def test_mamba1_has_mamba_ssm_parameters():
    """Names and shapes of mamba_ssm.modules.mamba_simple.Mamba(1024); 6,666,240 parameters in all."""
    with torch.device("meta"):
        mixer = Mamba1(1024)
    expected = {
        "A_log": (2048, 16),
        "D": (2048,),
        "in_proj.weight": (2 * 2048, 1024),
        "conv1d.weight": (2048, 1, 4),
        "conv1d.bias": (2048,),
        "x_proj.weight": (64 + 2 * 16, 2048),
        "dt_proj.weight": (2048, 64),
        "dt_proj.bias": (2048,),
        "out_proj.weight": (1024, 2048),
    }
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == expected
    assert sum(p.numel() for p in mixer.parameters()) == 6_666_240
    assert Mamba1(40).dt_rank == 3 and Mamba1(40, dt_rank=5).x_proj.weight.shape == (5 + 2 * 16, 80)
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"}


def test_mamba1_initial_values_are_mamba_ssms():
    mixer = Mamba1(1024, d_state=5)
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
    assert (dt.log().mean() - (math.log(1e-3) + math.log(0.1)) / 2).abs() < 0.15
    weight = mixer.dt_proj.weight  # uniform within 64 ** -0.5
    assert 0.124 < weight.abs().max() <= 0.125 and weight.mean().abs() < 1e-3
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 6).expand(2048, 5))
    assert (mixer.D == 1).all()
    assert torch.nn.functional.softplus(Mamba1(16, dt_init_floor=0.05).dt_proj.bias).min() > 0.0499


@pytest.mark.parametrize("operation", ["selective_scan", "selective_scan_step"])
def test_mamba1_keeps_dt_and_decay_in_float32(operation, monkeypatch):
    """In a model of bfloat16, before the recurrence too: A is up to -16, of which bfloat16 keeps two digits."""
    mixer, x = make("mamba1", {}, torch.float32)
    mixer, x = mixer.bfloat16(), x.bfloat16()
    called = []

    def record(x, dt, A, *rest):
        called.append((dt, A))
        return original(x, dt, A, *rest)

    original = getattr(mamba1, operation)
    monkeypatch.setattr(mamba1, operation, record)
    mixer.operations = mixer.operations | {"scan": record}
    mixer(x) if operation == "selective_scan" else mixer.step(x[:, 0], mixer.init_state(3))
    [(dt, A)] = called
    assert dt.dtype == A.dtype == torch.float32
    assert not torch.equal(dt, dt.bfloat16().float()) and not torch.equal(A, A.bfloat16().float())


@pytest.mark.parametrize("biases", [False, True])
def test_mamba1_equals_transformers(biases):
    """The independent reference: a two-layer MambaForCausalLM, its mixers exchanged for ours with copied weights."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50, hidden_size=16, state_size=8, num_hidden_layers=2, expand=2, conv_kernel=4, time_step_rank=3,
        use_bias=biases, use_conv_bias=not biases,
    )  # fmt: skip
    reference = MambaForCausalLM(config).double().eval()
    ids = torch.randint(50, (2, T))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = reference(ids, use_cache=False).logits
        x = reference.backbone.embeddings(ids)
        for layer in reference.backbone.layers:
            mixer = Mamba1(16, d_state=8, dt_rank=3, bias=biases, conv_bias=not biases).double()
            mixer.load_state_dict(layer.mixer.state_dict())
            x = x + mixer(layer.norm(x))
        logits = reference.lm_head(reference.backbone.norm_f(x))
    torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=2e-6)  # transformers rounds to float32
    assert expected.abs().max() > 0.1
