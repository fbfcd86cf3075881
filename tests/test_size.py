"""Model sizes: parameter counts of the presets, FLOPs, and the search for a size that meets a budget."""

import pytest
import torch
from small_token_lms import preset
from torch.utils.flop_counter import FlopCounterMode

from ssmttm import config
from ssmttm.cli import main
from ssmttm.errors import UserError
from ssmttm.models import build_model
from ssmttm.models.size import count_parameters, fit_budget, parse_count, size_of
from ssmttm.text.condition import TextCondition


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        ("prefix_simba", [], 281_042_176),
        ("prefix_simba", ["n_codebooks=4"], 287_339_776),
        ("prefix_simba", ["n_codebooks=9"], 297_835_776),
        ("prefix_simba", ["n_layers=6"], 72_427_072),
        ("prefix_simba", ["d_state=128"], 262_075_648),
        ("prefix_mamba", [], 298_541_824),
        ("cross_simba", [], 287_038_144),
        ("cross_simba", ["n_layers=24"], 381_754_624),
        ("cross_transformer", [], 305_075_200),
    ],
)
def test_paper_presets_have_the_papers_parameter_counts(name, overrides, parameters):
    """arXiv 2601.14786; where the paper gives no count, summed by hand from layers of the released sizes."""
    assert count_parameters(preset(name, *overrides)) == parameters


@pytest.mark.parametrize("experiments", [["attm_single"], ["attm_stage1", "attm_stage2"]])
def test_attm_presets_meet_the_limit_of_the_challenge(experiments):
    """The efficiency track allows 500 M parameters (arXiv 2605.21538)."""
    total = sum(count_parameters(config.load(f"experiment={name}").model) for name in experiments)
    assert 450e6 < total <= 500e6


def test_musicgen_preset_has_the_size_of_transformers_decoder():
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    with torch.device("meta"):
        reference = MusicgenForCausalLM(MusicgenDecoderConfig())  # the defaults are those of musicgen-small
    decoder = sum(p.numel() for p in reference.parameters())  # without the text projection
    assert count_parameters(preset("musicgen_small")) == decoder + 768 * 1024 + 1024


@pytest.mark.parametrize("vary", ["n_layers", "d_model"])
@pytest.mark.parametrize("name", ["prefix_simba", "cross_simba", "cross_transformer", "prefix_mamba"])
def test_fit_budget_finds_the_nearest_size(name, vary):
    model = preset(name)
    fit = fit_budget(model, 281_042_176, vary)
    assert fit.parameters == count_parameters({**model, vary: fit.value})
    step = 1 if vary == "n_layers" else 32
    for neighbour in (fit.value - step, fit.value + step):
        assert abs(count_parameters({**model, vary: neighbour}) - 281_042_176) >= abs(fit.parameters - 281_042_176)
    assert abs(fit.relative_error) < 0.05


def test_fit_budget_keeps_whole_layer_patterns():
    model = preset("prefix_simba", "layers=[mamba2,mamba2,attention]")
    assert fit_budget(model, 200_000_000).value % 3 == 0


def test_fit_budget_and_parse_count_reject_invalid_input():
    model = preset("prefix_simba")
    with pytest.raises(UserError, match="1,000,000 parameters are fewer than"):
        fit_budget(model, 1_000_000)
    with pytest.raises(UserError, match="unknown --vary 'depth'"):
        fit_budget(model, 10**8, "depth")
    written = {"72M": 72_000_000, "1.5b": 1_500_000_000, "9_000": 9000, "250k": 250_000}
    assert {text: parse_count(text) for text in written} == written
    for text in ("many", "-3M", "nan", ""):
        with pytest.raises(UserError, match="invalid parameter count"):
            parse_count(text)


@pytest.mark.parametrize("conditioning", ["prefix", "cross_attention", "adaln"])
@pytest.mark.parametrize("layers", ["mamba2", "attention"])
def test_token_lm_flops_equal_counted_flops(conditioning, layers):
    settings = dict(preset("tiny", "n_layers=2", f"conditioning={conditioning}", f"layers={layers}"))
    model = build_model(settings).eval()
    codes, text = torch.randint(1024, (1, 8, 200)), TextCondition.stack([torch.randn(20, 384)])
    with FlopCounterMode(display=False) as counter:
        model(codes, text)
    assert model.flops(200, 20) == pytest.approx(counter.get_total_flops(), rel=0.05)
    size = size_of(settings, 200, 20)
    assert size.forward * 200 == model.flops(200, 20)
    assert size.active == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for part in (model.embedding, model.text) for p in part.parameters()
    )


def test_size_command_prints_the_chosen_size(capsys):
    assert main.main(["size", "experiment=paper_cross_simba", "--parameters", "281M"]) == 0
    output = capsys.readouterr().out
    assert "model.n_layers=18: 287,038,144 parameters, +2.15% of the budget" in output and "times 6 N" in output
