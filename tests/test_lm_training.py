"""Training of a language model: its loss, settings, tag head, initialisation, samples, export."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import TAGS, losses, metric_rows, weights
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, lm_config, write_codes_store
from torch import nn
from torch.nn import functional as F

from ssmttm import checkpoint, config
from ssmttm.data import open_store
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.files import directory_lock
from ssmttm.models import build_model
from ssmttm.patterns import PATTERNS, get_pattern
from ssmttm.training import loop
from ssmttm.training.tasks import lm


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


def test_label_smoothing_gives_the_special_token_nothing():
    torch.manual_seed(0)
    V, eps = 5, 0.1
    targets, valid = torch.randint(0, V, (2, 3, 4)), torch.rand(2, 3, 4) > 0.3
    for n_logits in (V, V + 1):
        logits = torch.randn(2, 3, 4, n_logits)
        plain, smoothed, _ = lm.token_losses(logits, targets.masked_fill(~valid, V), valid, V, eps)
        expected = F.one_hot(targets, n_logits) * (1 - eps)
        expected[..., :V] += eps / V
        losses = -(expected * logits.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(smoothed, (losses * valid).sum((0, 2)))
        unsmoothed = F.cross_entropy(logits.permute(0, 3, 1, 2), targets, reduction="none")
        torch.testing.assert_close(plain, (unsmoothed * valid).sum((0, 2)))


@pytest.mark.parametrize("name", PATTERNS)
def test_special_tokens_and_padding_are_not_valid_targets(name):
    pattern = get_pattern(name, n_codebooks=3)
    codes = torch.randint(0, 9, (2, 3, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    sequence, valid = lm.interleave(pattern, codes, mask, 9)
    assert sequence.shape == (2, 3, pattern.sequence_length(5))
    assert valid.sum((0, 2)).tolist() == [8, 8, 8]
    assert torch.equal(sequence == 9, ~valid)
    assert torch.equal(pattern.revert(sequence)[0], codes[0])
    other = codes.clone()
    other[1, :, 3:] = 1
    assert torch.equal(lm.interleave(pattern, other, mask, 9)[0], sequence)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.codebook_size=8"], "model.codebook_size"),
        (["model.n_codebooks=5"], "model.n_codebooks"),
        (["model.text_dim=9"], "model.text_dim=8"),
        (["task=diffuse"], "task=diffuse"),
        (["train.precision=fp8"], "train.precision=fp8"),
        (["data.store=null"], "data_prep builtin"),
        (["data.store=nowhere"], "nowhere"),
        (["train.steps=many"], "train.steps must be an integer, got many"),
        (["train.minutes=inf"], "train.minutes must be a finite number"),
        (["data.batch_size=0"], "data.batch_size must be at least 1, got 0"),
        (["train.codebook_weights=[1,1]"], "codebook_weights"),
        (["train.codebook_weights=[1,1,1,0]"], "codebook_weights"),
        (["init=nowhere"], "nowhere"),
        (["optim.betas=[0.9]"], "optim.betas must be two numbers"),
        (["train.micro_batch_size=0"], "train.micro_batch_size must be at least 1, got 0"),
        (["losses.cross_entropy=-1"], "losses.cross_entropy must be at least 0, got -1"),
        (["data.text_encoder=google/flan-t5-base"], "holds the text of fake, not of .*--text google/flan-t5-base"),
    ],
)
def test_invalid_settings_are_one_clear_line(codes_store, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        loop.train(lm_config(codes_store, tmp_path / "run", *overrides))
    assert "\n" not in str(caught.value)
    assert not checkpoint.checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "model"), [("lm", "tiny_denoiser_ssm"), ("distill", "tiny_denoiser_ssm"), ("diffusion", "tiny")]
)
def test_model_of_another_kind_is_one_clear_line(codes_store, tmp_path, task, model):
    options = ["train.precision=fp32", *(["teacher=tiny_lm"] if task == "distill" else [])]
    paths = (f"data.store={codes_store}", f"run_dir={tmp_path}")
    with pytest.raises(UserError, match=f"task={task} trains a .*, not a"):
        loop.train(config.load(f"task={task}", f"model={model}", *paths, *options))


def test_run_folder_is_locked_by_one_training(codes_store, tmp_path):
    settings = lm_config(codes_store, tmp_path / "run", "train.steps=1")
    with directory_lock(tmp_path / "run", "training"), pytest.raises(UserError, match="another training"):
        loop.train(settings)
    loop.train(settings)


def test_lm_with_fewer_codebooks_learns_the_first_ones(codes_store, tmp_path):
    run_dir = loop.train(lm_config(codes_store, tmp_path / "run", "model.n_codebooks=1", "train.steps=2"))
    assert "codebook_0" in metric_rows(run_dir)[0] and "codebook_1" not in metric_rows(run_dir)[0]


@pytest.mark.parametrize(
    ("name", "positions"), [("delay", 23), ("parallel", 20), ("flatten", 80), ("coarse_first", 40)]
)
def test_lm_learns_with_every_pattern(codes_store, tmp_path, name, positions):
    settings = lm_config(codes_store, tmp_path / "run", f"pattern={name}", "train.steps=30", "data.batch_size=8")
    curve = losses(loop.train(settings))
    assert curve[0] == pytest.approx(math.log(CODEBOOK_SIZE), rel=0.1)
    assert curve[-1] < 0.97 * curve[0]
    task = lm.LanguageModelTask(settings)
    batch = task.loader("train", 2, 0, 1).batch(0)
    assert task.loss_denominators(batch).tolist() == [batch["frame_mask"].sum()] * N_CODEBOOKS + [2]
    assert task.throughput(batch, 0)[2] == 2 * task.model.flops(positions, batch["text"].mask.shape[1])


def test_codebook_weights_weight_the_cross_entropy(codes_store, tmp_path):
    settings = lm_config(codes_store, tmp_path / "run", "train.steps=1", "train.codebook_weights=[4,2,1,1]")
    first = metric_rows(loop.train(settings))[0]
    weighted = sum(weight * first[f"codebook_{k}"] for k, weight in enumerate((0.5, 0.25, 0.125, 0.125)))
    assert math.isclose(first["cross_entropy"], weighted, rel_tol=1e-5)
    assert not math.isclose(weighted, np.mean([first[f"codebook_{k}"] for k in range(4)]), rel_tol=1e-4)


def test_tag_head_learns_tags_from_the_text(codes_store, tmp_path):
    """Each caption of the store has its own tag, so the text determines it at the first position."""
    overrides = ("losses.tags=0.5", "tag_head.block=1", "optim.module_lr.tag_head=0.02", "data.caption_dropout=0")
    run_dir = loop.train(lm_config(codes_store, tmp_path / "run", *overrides, "train.steps=60", "data.batch_size=8"))
    metrics = [row["tags_from_text"] for row in metric_rows(run_dir) if "tags_from_text" in row]
    frequencies = np.array([4, 4, 4, 4, 4]) / 20  # in the training split
    entropy = float(-(frequencies * np.log(frequencies) + (1 - frequencies) * np.log(1 - frequencies)).sum())
    assert metrics[0] == pytest.approx(entropy, rel=0.3) and metrics[-1] < 0.3 * entropy
    tag_head = checkpoint.load_weights(run_dir / "checkpoints/step-00000060", module_name="tag_head")
    assert tag_head and not any("tag_head" in name for name in weights(run_dir))
    with pytest.raises(UserError, match="no tags that are frequent enough"):
        loop.train(lm_config(codes_store, tmp_path / "rare", *TAGS, "tag_head.min_share=2"))
    with pytest.raises(UserError, match=r"tag_head\.block=3"):
        loop.train(lm_config(codes_store, tmp_path / "other", "losses.tags=1", "tag_head.block=3"))


def test_tag_loss_has_gradients_up_to_its_block_only(codes_store, tmp_path):
    task = lm.LanguageModelTask(lm_config(codes_store, tmp_path / "run", "losses.tags=1", "tag_head.block=1"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    nn.init.normal_(task.modules["tag_head"].linear.weight)
    losses = task.losses(task.modules, batch, task.loss_denominators(batch), 0)["model"]
    losses["tags"].backward()
    assert task.model.text.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in task.model.blocks[0].parameters())
    assert all(p.grad is None for p in task.model.blocks[1].parameters()) and task.model.heads.weight.grad is None


def test_init_starts_from_another_models_weights(codes_store, tmp_path):
    first = loop.train(lm_config(codes_store, tmp_path / "first", "train.steps=5"))
    export(first, tmp_path / "model", half=False)
    average = checkpoint.load_weights(tmp_path / "model")
    second_config = lm_config(
        codes_store, tmp_path / "second", "train.steps=2", "optim.lr=0", "schedule.min_lr=0", f"init={tmp_path}/model"
    )
    second = loop.train(second_config)
    assert all(torch.equal(value, average[name]) for name, value in weights(second).items())
    shutil.rmtree(tmp_path / "model")
    second_config.train.steps = 3
    loop.train(second_config)  # a resumed run does not need the other model
    card = json.loads((export(second, tmp_path / "out") / "card.json").read_text())
    assert card["init"]["name"] == "model" and card["init"]["step"] == 5 and card["step"] == 3
    with pytest.raises(UserError, match=r"heads\.weight"):
        other = ("train.steps=1", f"init={first}", "model.n_codebooks=2")
        loop.train(lm_config(codes_store, tmp_path / "third", *other))


def test_init_rejects_a_model_of_another_codec(codes_store, tmp_path):
    model = export(loop.train(lm_config(codes_store, tmp_path / "first", "train.steps=1")), tmp_path / "model")
    card = json.loads((model / "card.json").read_text())
    card["data"]["codec"]["fingerprint"] = "f" * 16
    (model / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="codes of fake"):
        loop.train(lm_config(codes_store, tmp_path / "second", "train.steps=1", f"init={model}"))


def test_prompts_are_sampled_with_the_averaged_weights(codes_store, tmp_path, monkeypatch):
    calls = []

    class Pipe:
        def __init__(self, model, codec, text_encoder, pattern, **options):
            self.model = model

        def __call__(self, prompts, duration, seeds):
            calls.append((prompts, seeds, {n: p.clone() for n, p in self.model.named_parameters()}))
            return Out()

    class Out:
        audios, sample_rate = torch.zeros(3, 1, 50), 100

    monkeypatch.setattr(lm, "MusicPipeline", Pipe)
    encoder = SimpleNamespace(fingerprint=open_store(codes_store).info["text"]["fingerprint"])
    monkeypatch.setattr(lm, "load_store_codec", lambda *args: nn.Identity())
    monkeypatch.setattr(lm, "load_text_encoder", lambda name: encoder)
    run_dir = loop.train(lm_config(codes_store, tmp_path / "run", "train.steps=4", "train.sample_every=4"))
    prompts, seeds, used = calls[0]
    assert len(prompts) == 3 and seeds == [0, 1, 2]
    average = weights(run_dir, ema=True)
    assert all(torch.equal(used[name], average[name]) for name in used)
    assert any(not torch.equal(used[name], weights(run_dir)[name]) for name in used)
    names = sorted(path.name for path in (run_dir / "samples/step-00000004").iterdir())
    assert names[0] == "0-a-slow-waltz-in-d-minor-on-a-music-box.wav" and len(names) == 3


def test_exported_lm_has_the_averaged_weights_and_a_card(codes_store, tmp_path):
    run_dir = loop.train(lm_config(codes_store, tmp_path / "run", "train.steps=3"))
    out = export(run_dir, tmp_path / "out", half=False)
    average = weights(run_dir, ema=True)
    exported = checkpoint.load_weights(out)
    assert exported.keys() == average.keys() and all(torch.equal(exported[name], average[name]) for name in average)
    model = build_model(checkpoint.read_config(out).model)
    model.load_state_dict(checkpoint.load_weights(export(run_dir, tmp_path / "half")))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-3, atol=1e-4)
    card = json.loads((out / "card.json").read_text())
    assert card["data"]["codec"] == {"name": "fake", "fingerprint": "0" * 16}
    assert card["data"]["text"]["fingerprint"] == "1" * 16 and card["data"]["licences"] == {"CC0-1.0": 24}
    assert card["licence"] == "CC0-1.0"
    assert (
        card["step"] == 3
        and "valid/loss" in card["metrics"]
        and card["data"]["hours"].keys() == {"train", "valid", "test"}
    )
    assert str(tmp_path) not in "".join((out / name).read_text() for name in ("card.json", "config.yaml"))
    assert checkpoint.find_model(out) == out
    with pytest.raises(UserError, match="is an exported model already"):
        export(out, tmp_path / "again")
