"""Weight transfer: equal shapes, selected layers, sliced widths, attention to Mamba-2."""

import pytest
import torch
from small_token_lms import SMALL, VARIANTS, K, S, V, assert_equal, captions
from torch.nn import functional as F

from ssmttm.distill.layer_map import layer_map
from ssmttm.distill.weight_transfer import (
    attention_to_mamba2,
    channel_importance,
    copy_control_predictor,
    transfer_weights,
)
from ssmttm.errors import UserError
from ssmttm.mixers import Attention, Mamba2
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.ops.int8 import quantise

CONTROLS = {"chroma": True, "tempo": True}
MIXERS = {"mamba1": {}, "mamba2": {"ngroups": 2}, "mamba3": {}, "s4d": {"expand": 1}, "s4d wide": {}, "attention": {}}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = TokenLM(TokenLMConfig(**{**SMALL, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def mixer(name):
    return {"layers": name.split()[0], **MIXERS[name]}


@pytest.fixture
def codes():
    return torch.randint(V + 1, (3, K, S), generator=torch.Generator().manual_seed(1))


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "n_student", "n_teacher", "expected"),
    [
        ("even", 4, 8, [2, 4, 6, 8]),
        ("even", 3, 8, [3, 6, 8]),
        ("even", 3, 3, [1, 2, 3]),
        ("even", 4, 2, [1, 1, 2, 2]),
        ("first", 2, 5, [1, 2]),
        ("last", 2, 5, [4, 5]),
        ("ends", 4, 9, [1, 2, 8, 9]),
        ("ends", 3, 9, [1, 2, 9]),
        ([5, 1], 2, 5, [5, 1]),
    ],
)
def test_layer_map(kind, n_student, n_teacher, expected):
    assert layer_map(kind, n_student, n_teacher) == expected


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (3, "invalid layer map 3"), ([1, True], "invalid layer map"), ([1.0, 2], "invalid layer map"),
        ([1, 6], "no block 6"), ([0, 1], "no block 0"), ([1], "lists 1 blocks"), ("middle", "unknown layer map"),
    ],
)  # fmt: skip
def test_invalid_layer_maps_are_rejected(kind, message):
    with pytest.raises(UserError, match=message):
        layer_map(kind, 2, 5)
    with pytest.raises(UserError, match="more than its teacher"):
        layer_map("first", 6, 5)


# --- equal shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, *MIXERS, "controls"])
@pytest.mark.parametrize("width", [None, "first", "importance"])
def test_student_of_equal_shape_equals_teacher_bit_for_bit(variant, width, codes):
    changes = VARIANTS[variant] if variant in VARIANTS else mixer(variant) if variant in MIXERS else CONTROLS
    teacher, student = build(0, **changes), build(1, **changes)
    importance = channel_importance(teacher, [(codes, captions(4, 0, 7))]) if width == "importance" else None
    transferred = transfer_weights(teacher, student, "even", width, importance)
    assert set(transferred) == {name for name, _ in student.named_parameters()} and len(transferred) == len(
        set(transferred)
    )
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    assert torch.equal(student(codes, captions(4, 0, 7)), teacher(codes, captions(4, 0, 7)))


def test_student_of_selected_layers_equals_teacher_without_the_others(codes):
    teacher, student = build(0, n_layers=4), build(1, n_layers=2)
    transfer_weights(teacher, student, [2, 4], None)
    teacher.blocks = torch.nn.ModuleList([teacher.blocks[1], teacher.blocks[3]])
    assert torch.equal(student(codes, captions(4, 0, 7)), teacher(codes, captions(4, 0, 7)))


def test_sublayers_are_matched_by_function():
    """A teacher with cross-attention between mixer and MLP, a student with a text prefix."""
    teacher, student = build(0, conditioning="cross_attention"), build(1)
    transferred = transfer_weights(teacher, student, "even", None)
    assert {name for name, _ in student.named_parameters()} == set(transferred)
    for ours, theirs in [("0.inner.in_proj", "0.inner.in_proj"), ("1.inner.fc1", "2.inner.fc1"), ("1.norm", "2.norm")]:
        value = student.get_parameter(f"blocks.1.sublayers.{ours}.weight")
        assert torch.equal(value, teacher.get_parameter(f"blocks.1.sublayers.{theirs}.weight"))


def test_blocks_keep_initialisation_without_layer_transfer():
    teacher, student, fresh = build(0), build(1), build(1)
    transferred = transfer_weights(teacher, student, None, None)
    assert not [name for name in transferred if name.startswith("blocks")]
    for name, value in fresh.state_dict().items():
        taken = teacher.state_dict()[name] if name in transferred else value
        assert torch.equal(student.state_dict()[name], taken), name
    assert {"embedding.weight", "heads.weight", "text.linear.weight", "norm.weight"} <= set(transferred)


def test_transfer_returns_only_parameters_that_were_set():
    """The matrices of an int8 teacher are buffers, not parameters."""
    teacher, student, fresh = quantise(build(0)).float(), build(1).float(), build(1).float()
    transferred = transfer_weights(teacher, student, "even", "first")
    before = dict(fresh.named_parameters())
    assert set(transferred) == {
        name for name, value in student.named_parameters() if not torch.equal(value, before[name])
    }
    assert "embedding.weight" in transferred and "blocks.0.sublayers.0.inner.in_proj.weight" not in transferred


# --- slices ---------------------------------------------------------------------------------------------------------

WIDER = {
    "mamba1": {"layers": "mamba1", "d_state": 12},
    "mamba2": {"layers": "mamba2", "d_state": 12},
    "s4d": {"layers": "s4d", "expand": 1, "d_state": 12},
    "attention": {"layers": "attention", "n_heads": 3},
    "cross": {"layers": "mamba2", "conditioning": "cross_attention", "n_heads": 3},
    "adaln": {"layers": "mamba2", "conditioning": "adaln"},
}


@pytest.mark.parametrize("name", WIDER)
def test_sliced_parameters_hold_the_kept_channels(name):
    """Each weight of the teacher holds the index of its channel."""
    narrow = {k: v for k, v in WIDER[name].items() if k not in ("n_heads", "d_state")}
    teacher, student = build(0, d_model=24, **WIDER[name]), build(1, d_model=16, **narrow)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.shape[-1] == 24:
                parameter.copy_(torch.arange(24.0).expand_as(parameter))  # the last axis is d_model
    importance = channel_importance(teacher, [(torch.zeros(1, K, 4).long(), captions(2))])
    importance.model.copy_(torch.arange(24.0) % 3)  # keep channels 1, 2, 4, 5, ...
    transfer_weights(teacher, student, "even", "importance", importance)
    kept = torch.tensor([channel for channel in range(24) if channel % 3], dtype=torch.float64)
    for name, value in student.named_parameters():
        if "out_proj" not in name and value.shape[-1] == 16 and teacher.get_parameter(name).shape[-1] == 24:
            assert torch.equal(value, kept.expand_as(value)), name


def test_narrower_student_keeps_chroma_but_not_tempo_embedding():
    """The projection of the chroma is sliced; the tempo embedding depends on the width of its sinusoids."""
    teacher, student = build(0, d_model=24, **CONTROLS), build(1, d_model=16, **CONTROLS)
    fresh = build(1, d_model=16, **CONTROLS)
    transferred = transfer_weights(teacher, student, None, "first")
    assert torch.equal(student.chroma.linear.weight, teacher.chroma.linear.weight[:16]) and "chroma.null" in transferred
    assert torch.equal(student.tempo.null, fresh.tempo.null) and not [name for name in transferred if "tempo" in name]


def test_narrower_student_keeps_all_other_controls_and_the_predictor():
    controls = dict.fromkeys(("chroma", "tempo", "key", "metre", "bar_position", "timing", "predict_controls"), True)
    teacher, student = (build(seed, d_model=width, **controls) for seed, width in ((0, 24), (1, 16)))
    transfer_weights(teacher, student, None, "first")
    for name in ("key.classes.weight", "key.null", "metre.classes.weight", "bar_position.null", "timing.null"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name)[..., :16]), name
    for name in ("timing.start.weight", "timing.end.bias", "chroma.linear.weight"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name)[:16]), name
    names = copy_control_predictor(teacher, student)
    assert {"control_predictor.hidden.weight", "control_predictor.heads.bpm.bias"} <= set(names)
    found, expected = (model.control_predictor(captions(2)) for model in (student, teacher))
    assert all(torch.equal(found[name], expected[name]) for name in ("bpm", "key", "metre"))
    with pytest.raises(UserError, match=r"predicts tempo and key and metre .* set model\.predict_controls=false"):
        copy_control_predictor(build(0, d_model=24), student)


def test_channel_importance_removes_its_hooks(codes):
    teacher = build(0)
    channel_importance(teacher, [(codes, captions(4, 0, 7))])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("layers", ["mamba2", "mamba1", "attention"])
def test_importance_drops_dead_hidden_units_without_changing_logits(layers, codes):
    """A teacher with half of its hidden units switched off, cut to the other half."""
    wide = {"mlp_ratio": 4.0, "n_heads": 2}
    teacher = build(0, layers=layers, **wide)
    narrow = {"mlp_ratio": 2.0, "n_heads": 2}
    student = build(1, layers=layers, **narrow)
    text = captions(4, 0, 7)
    with torch.no_grad():
        for block in teacher.blocks:
            mlp = block.sublayers[-1].inner
            hidden = mlp.fc1.out_features
            dead = torch.randperm(hidden)[: hidden // 2]
            mlp.fc1.weight[dead], mlp.fc1.bias[dead] = 0, 0
    importance = channel_importance(teacher, [(codes, text)])
    transfer_weights(teacher, student, "even", "importance", importance)
    assert_equal(student(codes, text), teacher(codes, text))
    random_choice = build(2, layers=layers, **narrow)
    transfer_weights(teacher, random_choice, "even", "first", importance)
    assert (random_choice(codes, text) - teacher(codes, text)).abs().max() > 1e-3


def test_importance_drops_dead_heads_and_states_of_mamba2_exactly(codes):
    """Heads with x and gate 0, states with B and C 0. The norm after the heads averages half as many channels, which
    the student's norm weight compensates."""
    teacher, student = build(0, expand=4, d_state=16), build(1, expand=2, d_state=8)
    text, mixers = captions(4, 0, 7), [block.sublayers[0].inner for block in teacher.blocks]
    with torch.no_grad():
        for m in mixers:
            heads, states = torch.randperm(m.nheads)[: m.nheads // 2], torch.randperm(16)[:8]
            rows = (heads[:, None] * m.headdim + torch.arange(m.headdim)).flatten()
            m.in_proj.weight[rows], m.in_proj.weight[m.d_inner + rows], m.conv1d.bias[rows] = 0, 0, 0
            for first in (2 * m.d_inner, 2 * m.d_inner + 16):
                m.in_proj.weight[first + states], m.conv1d.bias[first - m.d_inner + states] = 0, 0
    own = [block.sublayers[0].inner for block in student.blocks]
    for m in (*mixers, *own):
        m.norm.eps = 1e-30  # not 0: positions of padding are 0
    transfer_weights(teacher, student, "even", "importance", channel_importance(teacher, [(codes, text)]))
    with torch.no_grad():
        for m in own:
            m.norm.weight.mul_(2**0.5)
    assert_equal(student(codes, text), teacher(codes, text), 1e-9)


# --- attention into Mamba-2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "expand", "state"), [(4, 1, 4), (4, 2, 8), (2, 1, 4), (1, 2, 6)])
def test_attention_to_mamba2_computes_linear_attention(groups, expand, state):
    """Reference: causal linear attention with the decay and step size of the mixer."""
    torch.manual_seed(0)
    width, heads, size = 16, 4, 4
    attention = Attention(width, n_heads=heads).double()
    mamba = Mamba2(width, d_state=state, expand=expand, headdim=size, ngroups=groups).double()
    transferred = attention_to_mamba2(attention, mamba, torch.arange(width))
    assert {"in_proj.weight", "out_proj.weight"} <= set(transferred)
    inputs = torch.randn(2, 7, width).double()
    q, k, v = (getattr(attention, f"{n}_proj")(inputs).unflatten(-1, (heads, size)) for n in "qkv")  # [B, T, H, P]
    q, k = (x.unflatten(2, (groups, -1)).mean(3).repeat_interleave(heads // groups, 2) for x in (q, k))
    q, k, v = F.silu(q), F.silu(k), F.silu(v)  # the activation of the mixer's convolution
    dt_rows = mamba.in_proj(inputs)[..., -mamba.nheads :]
    per_group = mamba.nheads // groups
    targets = [g * per_group + h for g in range(groups) for h in range(heads // groups)]
    dt = F.softplus(dt_rows + mamba.dt_bias)[..., targets]
    decay = -mamba.A_log.exp()[targets] * dt  # [B, T, H]
    expected = torch.zeros_like(v)
    for t in range(7):
        for s in range(t + 1):
            weight = (q[:, t] * k[:, s]).sum(-1) * decay[:, s + 1 : t + 1].sum(1).exp() * dt[:, s]  # [B, H]
            expected[:, t] += weight[..., None] * v[:, s]
        expected[:, t] += mamba.D[targets, None] * v[:, t]
    recorded = {}
    handle = mamba.norm.register_forward_pre_hook(lambda module, inputs: recorded.update(y=inputs[0]))
    mamba(inputs)
    handle.remove()
    found = recorded["y"].unflatten(-1, (mamba.nheads, size))
    assert_equal(found[:, :, targets], expected, 1e-9)
    out = mamba.out_proj.weight.view(width, mamba.nheads, size)
    assert torch.equal(out[:, targets].flatten(1), attention.out_proj.weight)
    silent = [head for head in range(mamba.nheads) if head not in targets]
    assert not found[:, :, silent].any() and out[:, silent].all()


def test_surplus_heads_and_states_of_mamba2_receive_gradients():
    """Their output starts at 0, but every parameter has a gradient after two steps."""
    torch.manual_seed(0)
    attention = Attention(16, n_heads=4).double()
    mamba = Mamba2(16, d_state=8, expand=2, headdim=4, ngroups=2).double()
    attention_to_mamba2(attention, mamba, torch.arange(16))
    optimizer, inputs, targets = torch.optim.SGD(mamba.parameters(), 0.1), *torch.randn(2, 3, 9, 16).double()
    for _ in range(3):
        optimizer.zero_grad()
        (mamba(inputs) - targets).square().mean().backward()
        optimizer.step()
    for name, parameter in mamba.named_parameters():
        assert bool((parameter.grad != 0).all()), name


def test_transformer_blocks_are_transferred_to_mamba2(codes):
    teacher = build(0, layers="attention", n_heads=4)
    student = build(1, layers="mamba2", headdim=4, ngroups=4, d_state=8)
    transferred = transfer_weights(teacher, student, "even", None)
    assert (
        "blocks.0.sublayers.0.inner.out_proj.weight" in transferred
        and "blocks.1.sublayers.1.inner.fc1.weight" in transferred
    )
    assert not [name for name in transferred if name.endswith(("A_log", "dt_bias", ".D"))]
    assert torch.equal(student.blocks[1].sublayers[1].inner.fc2.weight, teacher.blocks[1].sublayers[1].inner.fc2.weight)
    with pytest.raises(UserError, match=r"attention with 4 heads of width 4 needs a Mamba-2 with model.headdim=4"):
        transfer_weights(teacher, build(1, layers="mamba2", headdim=8), "even", None)


# --- invalid transfers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "width", "message"),
    [
        ({"n_codebooks": 2}, None, "model.n_codebooks=3"),
        ({"codebook_size": 8}, None, "model.codebook_size=16"),
        ({"text_dim": 5}, None, "model.text_dim=12"),
        ({"d_model": 24}, "first", "model.d_model=24, its teacher 16: weights are cut, not grown"),
        ({"d_model": 8}, None, "set distill.transfer.width=importance"),
        ({"d_state": 4}, None, "blocks.0.sublayers.0 has other widths"),
        ({"mlp_ratio": 1.0}, None, "blocks.0.sublayers.1 has other widths"),
        ({"d_model": 8}, "largest", "unknown distill.transfer.width 'largest'"),
        ({"d_state": 16}, "first", "16 state, .* of its teacher has 8"),
    ],
)
def test_unfit_students_are_rejected(changes, width, message):
    with pytest.raises(UserError, match=message):
        transfer_weights(build(0), build(1, **changes), "even", width)


def test_mamba3_of_other_width_is_rejected():
    teacher, student = build(0, layers="mamba3"), build(1, layers="mamba3", d_model=8)
    with pytest.raises(UserError, match="widths of a Mamba3 cannot be cut"):
        transfer_weights(teacher, student, "even", "first")
