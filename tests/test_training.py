"""The training loop and its tasks: losses, optimiser, EMA, signals, settings, tag head, init, export."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import train_in_two_processes
from small_runs import metric_rows
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, codec_config, lm_config, write_audio_store, write_codes_store
from torch import nn
from torch.nn import functional as F

from ssmttm import checkpoint, config
from ssmttm.codecs import TinyCodec, load_codec
from ssmttm.data import open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.export.model_folder import export
from ssmttm.files import directory_lock
from ssmttm.models import build_model
from ssmttm.patterns import PATTERNS, get_pattern
from ssmttm.training import loop, metrics, rng
from ssmttm.training.ema import EMA
from ssmttm.training.optim import build_optimizers
from ssmttm.training.optim.schedule import learning_rate
from ssmttm.training.step import TrainedModule
from ssmttm.training.tasks import codec, lm

ROOT = Path(__file__).parents[1]
TAGS = ("losses.tags=1", "tag_head.block=1")


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


def losses(run_dir):
    return [row["loss"] for row in metric_rows(run_dir) if "loss" in row]


def weights(run_dir, ema=False):
    return checkpoint.load_weights(checkpoint.latest_good(run_dir), ema=ema)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_lm_run_learns_and_writes_metrics_checkpoint_and_console_lines(codes_store, tmp_path, capsys):
    run_dir = loop.train(
        lm_config(codes_store, tmp_path / "run", "train.steps=40", "data.batch_size=8", "train.eval_every=20")
    )
    train_rows = [row for row in metric_rows(run_dir) if "loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, 41))
    rates = {"tokens_per_second", "audio_seconds_per_second", "mfu"}
    expected = {"cross_entropy", "lr", "grad_norm", "seconds", "samples", "flops", *rates}
    assert expected | {f"codebook_{k}" for k in range(N_CODEBOOKS)} <= train_rows[0].keys()
    assert train_rows[0]["loss"] == pytest.approx(math.log(CODEBOOK_SIZE), rel=0.1)
    assert train_rows[-1]["loss"] < 0.95 * train_rows[0]["loss"]
    valid = [row for row in metric_rows(run_dir) if "valid/loss" in row]
    assert [row["step"] for row in valid] == [20, 40] and valid[1]["valid/loss"] < valid[0]["valid/loss"]
    state = checkpoint.read_state(checkpoint.latest_good(run_dir))
    assert state["samples_seen"] == 320 == train_rows[-1]["samples"] and state["flops"] == train_rows[-1]["flops"] > 0
    assert state["data"]["licences"] == {"CC0-1.0": 24} and state["licence"] == "CC0-1.0"
    assert any((run_dir / "tensorboard").iterdir()) and (run_dir / "config.yaml").is_file()
    output = capsys.readouterr().out
    for word in ("parameters", "steps", "batch", "audio", "tokens/s", "audio-s/s", "MFU", "ETA", "valid"):
        assert word in output


def test_micro_batches_do_not_change_the_losses(codes_store, tmp_path):
    """Segments differ in length, so a mean of micro-batch means would differ from the mean over the batch."""
    overrides = ("train.steps=4", "data.batch_size=6", "data.caption_dropout=0.5", *TAGS)
    loop.train(lm_config(codes_store, tmp_path / "whole", *overrides))
    loop.train(lm_config(codes_store, tmp_path / "parts", *overrides, "train.micro_batch_size=4"))
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-5)


def test_two_processes_give_the_losses_of_one(codes_store, tmp_path):
    overrides = ("train.steps=4", "data.batch_size=6", "train.eval_every=2", "train.micro_batch_size=2", *TAGS)
    one = lm_config(codes_store, tmp_path / "one", *overrides)
    loop.train(one)
    train_in_two_processes(one, tmp_path / "two")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
    for metric in ("grad_norm", "valid/loss"):
        both = [[row[metric] for row in metric_rows(tmp_path / run) if metric in row] for run in ("one", "two")]
        np.testing.assert_allclose(*both, atol=1e-5)
    assert len(checkpoint.read_document(checkpoint.latest_good(tmp_path / "two"), "rng")) == 2


def test_validation_and_samples_do_not_change_training(audio_store, tmp_path, monkeypatch):
    def with_random_draws(function):
        def draw_and_call(*args):
            torch.rand(1), np.random.rand(), rng.random.random()
            return function(*args)

        return draw_and_call

    for name in ("validation", "samples"):
        monkeypatch.setattr(codec.CodecTask, name, with_random_draws(getattr(codec.CodecTask, name)))
    overrides = ("train.steps=5", "codec_training.restart_until=100")
    loop.train(codec_config(audio_store, tmp_path / "quiet", *overrides, "train.eval_every=0"))
    loop.train(codec_config(audio_store, tmp_path / "busy", *overrides, "train.eval_every=1", "train.sample_every=2"))
    for name, value in weights(tmp_path / "quiet").items():
        assert torch.equal(value, weights(tmp_path / "busy")[name]), name
    assert len(list((tmp_path / "busy/samples/step-00000004").glob("*-decoded.wav"))) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_signal_stops_after_the_step_with_a_checkpoint(codes_store, tmp_path, capsys, monkeypatch, number, code):
    def after_step(self, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return {}

    monkeypatch.setattr(lm.LanguageModelTask, "after_step", after_step)
    before = signal.getsignal(number)
    settings = lm_config(codes_store, tmp_path / "run", "train.steps=50", "train.eval_every=0")
    assert run_cli(lambda: loop.train(settings) and None) == code
    assert checkpoint.read_state(checkpoint.latest_good(tmp_path / "run"))["step"] == 4
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "step 4 of 50" in message and "same command" in message
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_update(codes_store, tmp_path, monkeypatch, value):
    original, kept = lm.LanguageModelTask.losses, {}

    def bad_losses(self, modules, batch, denominators, step):
        named = original(self, modules, batch, denominators, step)
        kept["model"] = self.model
        if step == 3:
            kept["weights"] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            named["model"]["cross_entropy"] = named["model"]["cross_entropy"] * value
        return named

    monkeypatch.setattr(lm.LanguageModelTask, "losses", bad_losses)
    once = ("train.eval_every=0", "train.skip_limit=1")
    with pytest.raises(UserError, match=r"step 4: loss.* not a finite number.* last checkpoint is .*step-00000003: "):
        loop.train(lm_config(codes_store, tmp_path / "run", *once, "train.checkpoint_every=3"))
    for name, tensor in kept["model"].state_dict().items():
        assert torch.equal(tensor, kept["weights"][name]), name
    assert checkpoint.read_state(checkpoint.latest_good(tmp_path / "run"))["step"] == 3
    with pytest.raises(UserError, match=r"step 4: loss.* not a finite number.* no checkpoint was written yet"):
        loop.train(lm_config(codes_store, tmp_path / "none", *once, "train.checkpoint_every=0"))
    with pytest.raises(UserError, match=r"step 4: .* last checkpoint is .*run/checkpoints/step-00000003: "):
        overrides = (*once, "train.checkpoint_every=3")
        resume = f"resume={tmp_path}/run/checkpoints/step-00000003"
        loop.train(lm_config(codes_store, tmp_path / "resumed", *overrides, resume))


SLOW_MAIN_PROCESS = """
import runpy, sys, time
from datetime import timedelta
from types import SimpleNamespace
from torch import distributed
distributed.init_process_group("gloo", timeout=timedelta(seconds=3))
from ssmttm import checkpoint
from ssmttm.training import loop
from ssmttm.training.tasks import lm

def slowly(function):
    def wait_and_call(*args, **options):
        time.sleep(6)
        return function(*args, **options)
    return wait_and_call

lm.load_store_codec = lm.load_text_encoder = lambda *args: SimpleNamespace(fingerprint="")
lm.check_fingerprint = lambda *args: None
lm.LanguageModelTask.samples = slowly(lambda self, step: [])
checkpoint.save_checkpoint = slowly(checkpoint.save_checkpoint)
loop.resume_folder = slowly(loop.resume_folder)
runpy.run_path("train.py", run_name="__main__")
"""


def test_process_group_outlasts_a_slow_main_process(codes_store, tmp_path):
    """While the main process looks for a checkpoint, samples and writes one, the others wait for 6 s each time, twice
    the time limit of the process group."""
    script = tmp_path / "train_slowly.py"
    script.write_text(SLOW_MAIN_PROCESS)
    once = ("train.steps=1", "train.eval_every=0", "train.sample_every=1", "train.checkpoint_every=1")
    settings = lm_config(codes_store, tmp_path / "unused", *once)
    train_in_two_processes(settings, tmp_path / "run", [str(script)])
    assert checkpoint.read_state(checkpoint.latest_good(tmp_path / "run"))["step"] == 1


def test_training_without_any_caption_warns(tmp_path, capsys):
    captions = ("", "", "", "", "", "only in the valid split")
    store = write_codes_store(tmp_path / "codes", captions=captions)
    loop.train(lm_config(store, tmp_path / "run", "train.steps=1"))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"no training segment of {store} has a caption" in warning
    loop.train(lm_config(write_codes_store(tmp_path / "other"), tmp_path / "second", "train.steps=1"))
    assert not capsys.readouterr().err


def test_training_on_segments_that_are_all_too_short_warns(codes_store, tmp_path, capsys):
    loop.train(lm_config(codes_store, tmp_path / "run", "train.steps=1", "data.frames=21"))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "is shorter than data.frames=21" in warning and "data.frames=20" in warning


def test_throughput_measures_its_peak_again_when_it_is_exceeded():
    measured = []

    def measure():
        measured.append(1e20)
        return 1e20

    throughput = metrics.Throughput(1e3, measure)
    throughput.add(1, 1, 1e6)
    assert 0 < throughput.rates()["mfu"] < 1e-3 and measured == [1e20]
    throughput.add(1, 1, 1e6)
    assert 0 < throughput.rates()["mfu"] < 1e-3 and measured == [1e20]
    throughput.add(1, 1, 1e30)
    assert throughput.rates()["mfu"] == 1 and throughput.peak_flops > 1e29


# --- optimiser, schedule, EMA, generators ----------------------------------------------------------------------------


def test_optimizer_decays_matrices_only():
    model = build_model(config.load("model=debug").model)
    settings = config.load().optim
    groups = build_optimizers(model, settings)["adamw"].param_groups
    names = [{name for name in group["param_names"]} for group in groups]
    not_decayed = names[1]
    assert names[0] | not_decayed == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "embedding" in name or name.endswith(("A_log", ".D", "dt_bias", "bias"))
        assert (name in not_decayed) == exempt, name
    settings.decay_embeddings = True
    assert "embedding.weight" in build_optimizers(model, settings)["adamw"].param_groups[0]["param_names"]
    matrix = nn.Linear(3, 3, bias=False)
    matrix.weight._no_weight_decay = True
    assert build_optimizers(matrix, settings)["adamw"].param_groups[0]["weight_decay"] == 0


def test_learning_rate_warms_up_and_follows_the_cosine():
    settings = config.load("optim.lr=1e-4", "schedule.min_lr=5e-7", "schedule.warmup_steps=500")
    rates = [learning_rate(step, 10_000, settings) for step in (0, 249, 499, 500, 5250, 9999, 12_000)]
    assert rates == pytest.approx([2e-7, 5e-5, 1e-4, 1e-4, (1e-4 + 5e-7) / 2, 5e-7, 5e-7], rel=1e-3)


def test_learning_rates_of_all_modules_have_one_schedule(audio_store, tmp_path, monkeypatch):
    overrides = ("train.steps=6", "optim.lr=1e-3", "schedule.min_lr=1e-4", "schedule.warmup_steps=2",
                 "optim.module_lr.discriminator=4e-3", "codec_training.restart_until=0")  # fmt: skip
    found, original = [], TrainedModule.update

    def update(self, skip):
        found.append(self.optimizers["adamw"].param_groups[0]["lr"])
        original(self, skip)

    monkeypatch.setattr(TrainedModule, "update", update)
    loop.train(codec_config(audio_store, tmp_path / "run", *overrides))
    model, discriminator = found[::2], found[1::2]
    assert discriminator == pytest.approx([4 * rate for rate in model])
    assert model[:3] == pytest.approx([5e-4, 1e-3, 1e-3]) and model[-1] < 3e-4
    settings = config.load("optim.lr=0", "schedule.warmup_steps=2", "optim.module_lr.tag_head=1")
    assert [learning_rate(step, 4, settings) for step in range(5)] == [0] * 5
    assert learning_rate(4, 4, settings, "tag_head") == 0


def test_ema_follows_its_formula_and_restores_the_weights():
    module = nn.BatchNorm1d(3)
    ema, expected = EMA(module, 0.5), torch.ones(3)
    for step in range(1, 12):
        with torch.no_grad():
            module.weight.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.state_dict()["weight"], expected)
    assert ema.state_dict().keys() == module.state_dict().keys()
    with ema.average_weights():
        torch.testing.assert_close(module.weight.data, expected)
    assert torch.equal(module.weight.data, torch.full((3,), 11.0))


def test_rng_state_round_trip_and_ranks_differ():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), rng.random.random(), rng.random.gauss(0, 1)

    rng.seed_all(3, rank=0)
    rng.random.gauss(0, 1)  # caches a second value
    state = json.loads(json.dumps(rng.get_state()))
    first = draw()
    with rng.isolated_rng(1):
        draw()
    rng.set_state(state)
    assert draw() == first
    rng.seed_all(3, rank=1)
    assert draw()[0] != first[0]


# --- the language model's loss --------------------------------------------------------------------------------------


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


# --- the codec ------------------------------------------------------------------------------------------------------


def test_discriminator_starts_at_its_step_and_each_loss_reaches_one_module(audio_store, tmp_path):
    settings = codec_config(audio_store, tmp_path / "run", "codec.quantiser_dropout=0")
    task = codec.CodecTask(settings)
    batch = task.loader("train", 2, 0, 1).batch(0)
    assert task.losses(task.modules, batch, task.loss_denominators(batch), step=2).keys() == {"model"}
    named = task.losses(task.modules, batch, task.loss_denominators(batch), step=3)
    assert named.keys() == {"model", "discriminator"} and {"adversarial", "feature", "mel"} <= named["model"].keys()
    discriminator = task.modules["discriminator"]
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
    (named["model"]["adversarial"] + named["model"]["feature"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in task.codec.parameters())
    task.codec.zero_grad()
    named["discriminator"]["discriminator"].backward()
    assert all(parameter.grad is None for parameter in task.codec.parameters())
    assert any(parameter.grad is not None for parameter in discriminator.parameters())


def test_codec_learns_and_unused_codes_are_restarted(audio_store, tmp_path):
    overrides = (
        "train.steps=24",
        "codec_training.adversarial_start=null",
        "codec_training.restart_until=6",
        "schedule.warmup_steps=2",
        "optim.lr=0.005",
    )
    run_dir = loop.train(codec_config(audio_store, tmp_path / "run", *overrides))
    mel = [row["valid/mel"] for row in metric_rows(run_dir) if "valid/mel" in row]
    assert len(mel) == 6 and mel[-1] < 0.8 * mel[0]
    restarted = [row.get("codes_restarted") for row in metric_rows(run_dir) if "mel" in row]
    assert restarted[0] is None and restarted[1] is not None and len(set(restarted[5:])) == 1
    assert not (checkpoint.latest_good(run_dir) / "discriminator.safetensors").exists()


def test_codec_restart_resets_averages_and_moments_of_the_restarted_entries(audio_store, tmp_path, monkeypatch):
    masks = []
    restart = TinyCodec.restart_unused_codes

    def restart_and_note(self, wav):
        masks.append(restart(self, wav)["quantiser.codebooks"])
        return {"quantiser.codebooks": masks[-1]}

    monkeypatch.setattr(TinyCodec, "restart_unused_codes", restart_and_note)
    overrides = ("train.steps=12", "train.ema_decay=0.99", "codec_training.restart_every=12")
    config = codec_config(audio_store, tmp_path / "run", *overrides, "codec_training.restart_until=100")
    folder = checkpoint.latest_good(loop.train(config))
    (mask,) = masks
    assert mask.any() and not mask.all()
    averages, books = (weights(tmp_path / "run", ema)["quantiser.codebooks"] for ema in (True, False))
    assert torch.equal(averages[mask], books[mask]) and not torch.equal(averages[~mask], books[~mask])
    optimizer = checkpoint.read_tensors(folder, "optimizer")
    for name in ("exp_avg", "exp_avg_sq"):
        moments = optimizer[f"model/quantiser.codebooks/{name}"]
        assert (moments[mask] == 0).all() and (moments[~mask] != 0).any()
    assert optimizer["model/quantiser.codebooks/step"] == 12


def test_codec_rejects_a_store_of_another_sample_rate(audio_store, tmp_path):
    with pytest.raises(UserError, match="2400 Hz and the codec works at 4800 Hz"):
        loop.train(codec_config(audio_store, tmp_path / "run", "codec.sample_rate=4800"))


# --- export ---------------------------------------------------------------------------------------------------------


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


def test_exported_codec_loads_as_a_codec(audio_store, tmp_path):
    run_dir = loop.train(codec_config(audio_store, tmp_path / "run", "train.steps=2"))
    loaded = load_codec(export(run_dir, tmp_path / "codec", half=False))
    average = weights(run_dir, ema=True)
    for name, value in loaded.weights().items():
        torch.testing.assert_close(value, average[name])
    assert json.loads((tmp_path / "codec/card.json").read_text())["data"]["licences"] == {"CC0-1.0": 12}


# --- train.py -------------------------------------------------------------------------------------------------------


def test_train_help_lists_experiments_and_an_error_is_one_line():
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in [*config.names("experiment"), "data.store", "resume="])
    wrong = subprocess.run([sys.executable, "train.py", "experiment=tinny"], cwd=ROOT, capture_output=True, text=True)
    assert (
        wrong.returncode == 2 and wrong.stderr == "error: no config experiment=tinny: did you mean experiment=tiny?\n"
    )
