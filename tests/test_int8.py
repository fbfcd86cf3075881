"""Int8 weights: arithmetic against a plain reference, export and loading, accuracy."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssmttm import MusicPipeline, UserError
from ssmttm.export.int8 import export_int8
from ssmttm.generation.loading import EMBEDDED
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.ops.int8 import Int8Linear, dequantise_rows, int8_linear, quantise, quantise_rows
from ssmttm.ops.linear import Linear
from ssmttm.text.condition import TextCondition

MIXERS = ["mamba1", "mamba2", "mamba3", "s4d", "attention"]


def small_model(layers=MIXERS, **options):
    torch.manual_seed(0)
    sizes = {"n_codebooks": 4, "codebook_size": 32, "d_model": 64, "d_state": 16, "headdim": 16, "n_heads": 4}
    return TokenLM(TokenLMConfig(**sizes, n_layers=5, layers=layers, text_dim=48, **options)).eval()


def random_text(rows, width, length=5):
    return TextCondition(torch.randn(rows, length, width), torch.ones(rows, length, dtype=torch.bool))


def relative_error(y, expected):
    return float((y - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_quantise_rows_error_is_within_half_a_step_of_the_row_scale(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 10
    int8, scale = quantise_rows(weight)
    assert int8.dtype == torch.int8 and int(int8.abs().max()) <= 127
    assert ((dequantise_rows(int8, scale) - weight).abs() <= 0.76 * scale[:, None]).all()
    assert torch.equal(scale.bfloat16().float(), scale)


def test_quantise_rows_keeps_zeros():
    int8, scale = quantise_rows(torch.zeros(3, 4))
    assert not dequantise_rows(int8, scale).any() and scale.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("outputs, inputs", [(132, 48), (64, 256), (33, 24), (7, 1), (130, 100)])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 9])
def test_int8_linear_equals_product_with_dequantised_weight(outputs, inputs, rows):
    """Also for shapes where torch's kernel would read out of bounds. Activations in bfloat16 have 8 bits."""
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    int8, scale = quantise_rows(torch.randn(outputs, inputs))
    expected = F.linear(x, int8.float() * scale[:, None], bias)
    assert relative_error(int8_linear(x, int8, scale, bias), expected) < 0.01
    sequence = int8_linear(x[None], int8, scale, bias)
    assert torch.allclose(sequence[0], expected, atol=1e-5)


@torch.no_grad()
def test_int8_linear_rows_are_independent_of_the_batch():
    x = torch.randn(20, 64)
    int8, scale = quantise_rows(torch.randn(32, 64))
    together = int8_linear(x, int8, scale)
    for row in range(20):
        assert torch.equal(int8_linear(x[row : row + 1], int8, scale)[0], together[row])


@pytest.mark.parametrize("options", [{}, {"conditioning": "cross_attention"}, {"conditioning": "adaln"}], ids=str)
def test_int8_model_is_close_to_the_original_and_its_steps_to_its_forward(options):
    model = small_model(**options)
    codes, text = torch.randint(32, (2, 4, 12)), random_text(2, 48)
    with torch.no_grad():
        before = model(codes, text)
        flops, quantised = model.flops(12, 5), quantise(model)
        assert quantised is model and model.flops(12, 5) == flops
        kinds = {type(module) for name, module in model.named_modules() if isinstance(module, Linear)
                 and not name.endswith("dt_proj")}  # fmt: skip
        assert kinds == {Int8Linear}
        after = model(codes, text)
        assert 0 < relative_error(after, before) < 0.03
        state = model.init_state(2)
        stepped = [model.prefill(codes[..., :3], text, state)]
        stepped += [model.step(codes[..., position], state) for position in range(3, 12)]
    assert relative_error(torch.stack(stepped, 2), after[:, :, 2:]) < 0.02


def test_int8_weights_are_used():
    """A changed int8 weight changes the logits of a step and of a sequence."""
    model = quantise(small_model("mamba2"))
    codes, text = torch.randint(32, (1, 4, 3)), random_text(1, 48)
    before = model.prefill(codes, text, model.init_state(1))
    model.heads.scale.mul_(2.0)
    assert torch.allclose(model.prefill(codes, text, model.init_state(1)), 2 * before, rtol=0.02, atol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_int8("tiny_lm", tmp_path_factory.mktemp("int8") / "model")


def test_int8_folder_is_smaller_and_deterministic(folder):
    pipe = MusicPipeline.from_pretrained(folder)
    assert isinstance(pipe.model.heads, Int8Linear) and pipe.model.heads.int8.dtype == torch.int8
    size, half = ((path / "model.safetensors").stat().st_size for path in (folder, EMBEDDED))
    assert size < 0.65 * half
    first, again = (pipe("a calm piano piece", duration=0.5, seeds=[1]) for _ in range(2))
    batch = pipe(["fast techno", "a calm piano piece"], duration=0.5, seeds=[0, 1])
    assert torch.equal(first.codes, again.codes) and torch.equal(batch.codes[1], first.codes[0])


def test_int8_embedded_model_has_nearly_the_same_predictions(folder):
    """Log-probabilities of the model's own codes."""
    whole, small = MusicPipeline.from_pretrained("tiny_lm"), MusicPipeline.from_pretrained(folder)
    codes = whole("a slow waltz on a music box", duration=2.0).codes[:, : whole.model.config.n_codebooks]
    sequence = whole.pattern.build(codes, whole.model.special_token_id)
    text = whole.text_encoder.encode(["a slow waltz on a music box"])
    with torch.no_grad():
        expected, given = (pipe.model(sequence, text).log_softmax(-1) for pipe in (whole, small))
    divergence = F.kl_div(given, expected, log_target=True, reduction="none").sum(-1).mean()
    assert 0 < divergence < 0.01 and relative_error(given, expected) < 0.02


def test_int8_export_errors(folder, tmp_path):
    with pytest.raises(UserError, match="are int8 already"):
        export_int8(folder, tmp_path / "twice")
    with pytest.raises(UserError, match="not empty"):
        export_int8("tiny_lm", folder)
    other = export_int8("tiny_lm", tmp_path / "other")
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"weights": "int3"}))
    with pytest.raises(UserError, match=r"unknown weights format 'int3'.* known is int8"):
        MusicPipeline.from_pretrained(other)
    (other / "card.json").write_text(json.dumps({key: value for key, value in card.items() if key != "weights"}))
    with pytest.raises(UserError, match="does not hold this model"):
        MusicPipeline.from_pretrained(other)
