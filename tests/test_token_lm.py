"""TokenLM: prefill and steps equal forward, padding, conditioning, initialisation, errors."""

import pytest
import torch
from far_device import FAR, far_device
from small_token_lms import SMALL, VARIANTS, E, K, S, V, assert_equal, captions, preset, randomised, small_token_lm
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.errors import UserError
from ssmttm.models import TokenLM, TokenLMConfig, build_model
from ssmttm.text.condition import TextCondition


@pytest.fixture(params=VARIANTS)
def model(request):
    return randomised(small_token_lm(**VARIANTS[request.param]).double().eval())


@pytest.fixture
def codes():
    return torch.randint(V + 1, (3, K, S), generator=torch.Generator().manual_seed(1))


def test_forward_equals_prefill_and_steps_at_every_split(model, codes):
    text = captions(4, 0, 7)
    expected = model(codes, text)
    assert expected.shape == (3, K, S, V + model.config.predict_special)
    assert expected.transpose(1, 2).is_contiguous()
    for split in range(1, S + 1):
        state = model.init_state(3)
        found = [model.prefill(codes[..., :split], text, state)]
        found += [model.step(codes[..., s], state) for s in range(split, S)]
        assert_equal(torch.stack(found, 2), expected[:, :, split - 1 :])
        assert state.position == S


def test_two_prefills_equal_one(model, codes):
    text = captions(4, 0, 7)
    state, whole = model.init_state(3), model.init_state(3)
    model.prefill(codes[..., :9], text, state)
    copy = state.clone()
    assert_equal(model.prefill(codes[..., 9:], None, state), model.prefill(codes, text, whole))
    assert_equal(model.prefill(codes[..., 9:], None, copy), model.prefill(codes, text, model.init_state(3)))


def test_logits_are_causal(model, codes):
    text, changed = captions(4, 0, 7), codes.clone()
    changed[..., 10:] = (changed[..., 10:] + 1) % V
    before, after = model(codes, text), model(changed, text)
    assert_equal(after[:, :, :10], before[:, :, :10])
    assert (after[:, :, 10] != before[:, :, 10]).any(-1).all()


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_text_padding_changes_no_logit(model, codes, where):
    text = captions(4, 0, 7)
    slots = {"left": range(9, 16), "right": range(7), "scattered": [1, 2, 5, 8, 9, 13, 15]}[where]
    embeddings = torch.full((3, 16, E), torch.nan)  # values at padding are not read
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, valid in enumerate(text.mask):
        n = int(valid.sum())
        if n:
            chosen = torch.tensor(list(slots)[:n])
            embeddings[row, chosen], mask[row, chosen] = text.embeddings[row, valid], True
    padded = TextCondition(embeddings, mask)
    expected = model(codes, text)
    assert_equal(model(codes, padded), expected)
    state, reference = model.init_state(3), model.init_state(3)
    assert_equal(model.prefill(codes, padded, state), model.prefill(codes, text, reference))
    assert_equal(model.step(codes[..., 0], state), model.step(codes[..., 0], reference))
    alone = TextCondition(text.embeddings[:1, text.mask[0]], text.mask[:1, text.mask[0]])
    assert_equal(model(codes[:1], alone), expected[:1])


@pytest.mark.parametrize("layers", ["mamba1", "mamba2", "mamba3", "s4d", "attention"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_text_padding_changes_no_gradient(layers, norm):
    """At initialisation, when biases are zero: gradients must not explode at padding."""
    model = small_token_lm(n_layers=8, layers=layers, norm=norm)
    codes, text = torch.randint(V, (2, K, S)), captions(2, 40)

    def gradients(rows):
        model.zero_grad()
        for row in rows:
            mask = text.mask[row].any(0)  # [L]
            model(codes[row], TextCondition(text.embeddings[row][:, mask], text.mask[row][:, mask])).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    padded, separate = gradients([[0, 1]]), gradients([[0], [1]])
    for name, gradient in separate.items():
        assert_equal(padded[name], gradient, 1e-4 * float(gradient.abs().max()))


def test_text_changes_every_logit_and_empty_text_equals_none(model, codes):
    text = captions(4, 0, 7)
    before, after = model(codes, text), model(codes, captions(4, 0, 7, seed=3))
    changed = (before - after).abs().amax(-1)  # [B, K, S]
    assert (changed[[0, 2]] > 1e-9).all() and (changed[1] == 0).all()
    assert_equal(model(codes, None)[1], before[1])
    shuffled = model(codes, TextCondition(text.embeddings.flip(1), text.mask.flip(1)))
    order_matters = (shuffled - before).abs()[[0, 2]].max() > 1e-6
    assert order_matters == (model.config.conditioning == "prefix")  # the others do not depend on the order of tokens


def test_text_projection_gets_gradients(model, codes):
    model(codes, captions(2, 2, 2)).logsumexp(-1).sum().backward()
    assert model.text.linear.weight.grad.abs().sum() > 0
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_audio_positions_do_not_depend_on_the_text():
    """Without layers the audio logits are independent of the length of the text prefix."""
    torch.manual_seed(0)
    model = TokenLM(TokenLMConfig(**{**SMALL, "positions": "sinusoidal", "n_layers": 0})).double()
    codes = torch.randint(V, (2, K, S))
    assert_equal(model(codes, captions(1, 9)), model(codes, captions(5, 0)))
    assert (model(codes, None) - model(codes.flip(-1), None).flip(2)).abs().max() > 1e-6


def test_token_lm_autocast_agrees_with_float32(codes):
    torch.manual_seed(0)
    model, text = TokenLM(TokenLMConfig(**SMALL)), captions(4, 0, 7)
    expected = model(codes, text)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(codes, text)
        state = model.init_state(3, dtype=torch.bfloat16)
        model.prefill(codes[..., :5], text, state)
        steps = torch.stack([model.step(codes[..., s], state) for s in range(5, S)], 2)
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
    assert (steps - expected[:, :, 5:]).abs().max() < 0.03 * expected.abs().max()


def test_token_lm_dropout_acts_in_training_only(codes):
    model = TokenLM(TokenLMConfig(**{**SMALL, "dropout": 0.5}))
    assert not torch.equal(model(codes, None), model(codes, None))
    model.eval()
    assert torch.equal(model(codes, None), model(codes, None))


def test_special_token_id_follows_the_codes():
    with torch.device("meta"):
        model = build_model(preset("prefix_simba"))
    assert model.special_token_id == 1024 and model.n_logits == 1025


def test_model_presets_build():
    with torch.device("meta"):
        tiny, debug = build_model(preset("tiny")), build_model(preset("debug"))
    assert 7e6 < sum(p.numel() for p in tiny.parameters()) < 11e6 and tiny.config.n_codebooks == 8
    assert sum(p.numel() for p in debug.parameters()) < 1e5


def test_initialisation_is_small_and_keeps_the_recurrence():
    torch.manual_seed(0)
    model = TokenLM(TokenLMConfig(n_layers=4, codebook_size=256))
    logits = model(torch.randint(256, (1, 8, 30)), None)
    assert logits.abs().max() < 3  # near uniform: a first loss of about log(codebook_size)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = model.blocks[0].sublayers[0].inner
    assert (mixer.A_log.exp() >= 1).all() and (torch.nn.functional.softplus(mixer.dt_bias) > 0.9e-3).all()
    assert mixer.out_proj.weight.abs().max() <= 1 / 512**0.5 / 8**0.5


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if "init_std" not in changes])
def test_residual_projections_are_scaled_by_the_number_of_sublayers(name):
    """By the root of 2 n_layers or, with cross-attention, of 3 n_layers."""
    scaled, unscaled = small_token_lm(**VARIANTS[name]), small_token_lm(**VARIANTS[name] | {"init_std": None})
    per_layer = 3 if scaled.config.conditioning == "cross_attention" else 2
    divisor = (per_layer * scaled.config.n_layers) ** 0.5
    names = [name for name, _ in scaled.named_parameters() if name.endswith(("out_proj.weight", "fc2.weight"))]
    assert len(names) == per_layer * scaled.config.n_layers
    for name in names:
        assert torch.equal(scaled.get_parameter(name), unscaled.get_parameter(name) / divisor)


@pytest.mark.parametrize("name", VARIANTS)
def test_step_copies_nothing_between_host_and_device(name):
    model = small_token_lm(**VARIANTS[name]).to(FAR)
    state, codes = model.init_state(2), torch.zeros(2, K, dtype=torch.long, device=FAR)
    text = captions(4, 0).to(FAR)
    with far_device():
        model(codes[..., None], text)  # with adaLN the text acts here
        assert model.step(codes, state).device == FAR


def test_step_has_constant_cost_and_updates_state_in_place(codes):
    model = TokenLM(TokenLMConfig(**SMALL)).eval()
    state = model.init_state(3)
    model.prefill(codes, captions(4, 0, 7), state)
    tensors = [t for states in state.blocks for s in states if s.inner is not None for t in vars(s.inner).values()]
    addresses = [t.data_ptr() for t in tensors]
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            model.step(codes[..., 0], state)
        assert counter.get_total_flops() == pytest.approx(3 * model.flops(1, 0), rel=0.3)
    assert [t.data_ptr() for t in tensors] == addresses


def test_token_lm_errors_are_clear(codes):
    model = TokenLM(TokenLMConfig(**SMALL))
    text = captions(4, 0, 7)
    with pytest.raises(UserError, match="the codes have 2 codebooks, the model has 3"):
        model(codes[:, :2], text)
    with pytest.raises(UserError, match="got 3 captions for a batch of 2"):
        model(codes[:2], text)
    with pytest.raises(UserError, match=r"model\.text_dim is 12"):
        model(codes, TextCondition(torch.zeros(3, 2, 5), torch.ones(3, 2, dtype=torch.bool)))
    with pytest.raises(UserError, match="codes are empty"):
        model(codes[..., :0], text)
    for call in (lambda s: model.prefill(codes, text, s), lambda s: model.step(codes[..., 0], s)):
        with pytest.raises(UserError, match="the state has batch size 2"):
            call(model.init_state(2))
    with pytest.raises(UserError, match=r"unknown model\.kind 'gpt'"):
        build_model({"kind": "gpt"})
    with pytest.raises(UserError, match=r"unknown model\.d_modle"):
        build_model({"kind": "token_lm", "d_modle": 3})
    with pytest.raises(UserError, match=r"unknown model\.block 'resnet': choose from simba, mamba"):
        build_model({"kind": "token_lm", "block": "resnet"})
    with pytest.raises(UserError, match="unknown layer 'mamba7'"):
        build_model({"kind": "token_lm", "layers": ["mamba7"]})
    with pytest.raises(UserError, match="joint counts a text prefix"):
        TokenLMConfig(positions="joint", conditioning="adaln")
    with pytest.raises(UserError, match="rotary acts in attention layers"):
        TokenLMConfig(positions="rotary", layers=["mamba2", "mamba1"])
    with pytest.raises(UserError, match=r"unknown model\.conditioning 'film'"):
        build_model({"kind": "token_lm", "conditioning": "film"})


@pytest.mark.parametrize("conditioning", ["cross_attention", "adaln"])
def test_state_assembled_by_write_rows_equals_single_states(conditioning, codes):
    """Rows with different texts written into one state, as in the sampling loop."""
    model = randomised(small_token_lm(conditioning=conditioning, layers=["mamba2", "attention"]).double())
    batched, expected = model.init_state(3), []
    for row, length in enumerate((4, 0, 7)):
        text = captions(length, seed=row)
        alone = model.init_state(1)
        model.prefill(codes[row : row + 1, :, :5], text, alone)
        batched.write_rows(slice(row, row + 1), alone)
        expected.append([model.step(codes[row : row + 1, :, s], alone)[0] for s in range(5, S)])
    found = torch.stack([model.step(codes[..., s], batched) for s in range(5, S)], 1)
    assert_equal(found, torch.stack([torch.stack(row) for row in expected]))


def test_adaln_is_identity_at_first_and_learns():
    torch.manual_seed(0)
    model = TokenLM(TokenLMConfig(**{**SMALL, "conditioning": "adaln"}))
    codes = torch.randint(V, (2, K, S))
    assert torch.equal(model(codes, captions(3, 5)), model(codes, None))
    model(codes, captions(3, 5)).square().sum().backward()
    assert all(sublayer.adaln.linear.weight.grad.any() for block in model.blocks for sublayer in block.sublayers)


def test_layer_scale_is_initialised_and_learnt():
    model = TokenLM(TokenLMConfig(**{**SMALL, "layer_scale": 1e-4}))
    codes = torch.randint(V, (2, K, S))
    scales = [sublayer.layer_scale for block in model.blocks for sublayer in block.sublayers]
    assert all(scale.shape == (16,) and (scale == 1e-4).all() for scale in scales)
    x = torch.randn(1, 5, 16)
    assert 0 < (model.blocks[0](x) - x).abs().max() < 1e-2
    model(codes, None).square().sum().backward()
    assert all(scale.grad.abs().sum() > 0 for scale in scales)
