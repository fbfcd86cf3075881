"""Optimisers and schedules: Muon block by block, learning rates, resume, z-loss."""

import pytest
import torch
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import lm_config, write_codes_store
from torch import nn

from ssmttm import config
from ssmttm.errors import UserError
from ssmttm.mixers import MIXERS, build_mixer
from ssmttm.models import build_model
from ssmttm.training import loop
from ssmttm.training.optim import build_optimizers, fused_rows
from ssmttm.training.optim.schedule import learning_rate
from ssmttm.training.tasks import lm

SMALL = ("train.steps=6", "data.batch_size=2", "train.eval_every=0", "train.checkpoint_every=1000")


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


# --- Muon ------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = build_model(config.load("model=debug", "model.conditioning=cross_attention").model)
    optimizers = build_optimizers(model, config.load("optim=muon").optim)
    names = {kind: {name for group in optimizer.param_groups for name in group["param_names"]}
             for kind, optimizer in optimizers.items()}  # fmt: skip
    assert names["muon"] | names["adamw"] == {name for name, _ in model.named_parameters()}
    assert not names["muon"] & names["adamw"]
    assert {"blocks.0.sublayers.0.inner.in_proj.weight", "text.linear.weight"} <= names["muon"]
    assert {"embedding.weight", "heads.weight", "blocks.0.sublayers.0.inner.conv1d.weight"} <= names["adamw"]
    assert build_optimizers(model, config.load("optim=muon").optim, "discriminator").keys() == {"adamw"}


@pytest.mark.parametrize("name", MIXERS)
def test_fused_rows_are_those_of_the_projections(name):
    mixer = build_mixer(name, 32, d_state=8, headdim=16, ngroups=1, n_heads=2)
    rows = mixer.fused_rows()
    assert bool(rows) == name.startswith("mamba")
    for weight, heights in rows.items():
        assert sum(heights) == len(mixer.get_parameter(weight))
    if name == "mamba2":
        assert rows == {"in_proj.weight": [64, 64, 8, 8, 4]}  # z, x, B, C, dt


def test_muon_updates_each_block_of_a_fused_projection_as_a_matrix_of_its_own():
    """The reference: torch's Muon on separate matrices."""
    torch.manual_seed(0)
    mixer = build_mixer("mamba2", 32, d_state=8, headdim=16, ngroups=1)
    settings = config.load("optim=muon", "optim.lr=0.01", "optim.weight_decay=0.1").optim
    heights = mixer.fused_rows()["in_proj.weight"]
    assert fused_rows(nn.ModuleList([mixer]))[mixer.in_proj.weight] == heights
    parts = [nn.Parameter(part.clone()) for part in mixer.in_proj.weight.detach().split(heights)]
    reference = torch.optim.Muon(parts, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    ours = build_optimizers(mixer, settings)["muon"]
    for _ in range(3):
        grad = torch.randn_like(mixer.in_proj.weight)
        mixer.in_proj.weight.grad = grad
        for part, its in zip(parts, grad.split(heights), strict=True):
            part.grad = its.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mixer.in_proj.weight.detach(), torch.cat([part.detach() for part in parts]))


def test_muon_learns_and_resumes_exactly(codes_store, tmp_path, monkeypatch):
    overrides = (*SMALL, "optim=muon", "train.steps=12")
    loop.train(lm_config(codes_store, tmp_path / "uninterrupted", *overrides))
    settings = lm_config(codes_store, tmp_path / "stopped", *overrides)
    train_with_stops(settings, lm.LanguageModelTask, (5,), monkeypatch)
    first = run_contents(tmp_path / "uninterrupted")
    assert_same_runs(first, run_contents(tmp_path / "stopped"))
    assert any(name.startswith("model.muon/") for name in first[0]["optimizer"])
    rows = metric_rows(tmp_path / "uninterrupted")
    assert rows[-1]["loss"] < 0.98 * rows[0]["loss"]


# --- schedules -------------------------------------------------------------------------------------------------------


def rates(*overrides, steps=100):
    settings = config.load("optim.lr=1e-3", "schedule.min_lr=1e-4", "schedule.warmup_steps=10", *overrides)
    return [learning_rate(step, steps, settings) for step in range(steps + 2)]


@pytest.mark.parametrize("kind", config.names("schedule"))
def test_every_schedule_warms_up_and_ends_where_it_says(kind):
    found = rates(f"schedule={kind}")
    assert found[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(1e-3)
    assert found[100:] == pytest.approx([1e-3 if kind == "constant" else 1e-4] * 2)
    middle = {"cosine": 5.5e-4, "linear": 5.5e-4, "wsd": 1e-3, "constant": 1e-3}
    assert found[55] == pytest.approx(middle[kind])


def test_wsd_is_stable_until_its_decay():
    found = rates("schedule=wsd", "schedule.decay_steps=30")
    assert found[10:71] == pytest.approx([1e-3] * 61)
    assert found[85] == pytest.approx(5.5e-4)
    assert rates("schedule=wsd")[80:83] == pytest.approx([1e-3, 9.55e-4, 9.1e-4])  # a fifth
    longer = rates("schedule=wsd", "schedule.decay_steps=30", steps=200)
    assert longer[:71] == found[:71]  # a prolonged run goes on as it was


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule=wsd", "schedule.decay_steps=5", "schedule.warmup_steps=2"],
            "warm-up of 2 and a decay of 5 steps do",
        ),
        (["optim.kind=sgd"], "unknown optim.kind=sgd"),
        (["optim=muon", "optim.momentum=2"], r"optim.momentum must be in \[0, 1\), got 2.0"),
        (["schedule.kind=step", "schedule.warmup_steps=100"], "unknown schedule.kind=step"),
        (["schedule.kind=step", "schedule.warmup_steps=100", "train.minutes=0.001"], "unknown schedule.kind=step"),
        (["schedule=wsd", "schedule.decay_steps=0"], "schedule.decay_steps must be at least 1"),
    ],
)
def test_unusable_optimiser_or_schedule_is_one_clear_line(codes_store, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        loop.train(lm_config(codes_store, tmp_path / "run", *SMALL, *overrides))
    assert "\n" not in str(caught.value)


def test_timed_run_that_is_too_short_for_its_schedule_warns(codes_store, tmp_path, capsys):
    timed = ("train.minutes=0.001", "schedule=wsd", "schedule.decay_steps=100000", "train.eval_every=0")
    loop.train(lm_config(codes_store, tmp_path / "run", *SMALL, *timed))
    assert "a decay of 100000 steps do not fit into" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "change"), [("optim=muon", "adamw -> muon"), ("schedule=wsd", "cosine -> wsd")])
def test_resume_with_another_optimiser_or_schedule_is_one_clear_line(codes_store, tmp_path, override, change):
    loop.train(lm_config(codes_store, tmp_path / "run", *SMALL, "train.steps=1"))
    with pytest.raises(UserError, match=f"kind: {change}.*another run_dir"):
        loop.train(lm_config(codes_store, tmp_path / "run", *SMALL, override, "schedule.warmup_steps=1"))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_z_loss_is_the_squared_log_of_the_denominator(codes_store, tmp_path):
    logits, valid = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4) > 0.3
    expected = (logits.exp().sum(-1).log() ** 2 * valid).sum((0, 2))
    targets = torch.zeros(2, 3, 4, dtype=torch.int64)
    torch.testing.assert_close(lm.token_losses(logits, targets, valid, 5, 0.0)[2], expected)
    run = loop.train(lm_config(codes_store, tmp_path / "run", *SMALL, "train.steps=1", "losses.z_loss=0.1"))
    row = metric_rows(run)[0]
    assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.1 * row["z_loss"])
