"""The training loop: metrics, processes, signals, generators, optimiser, schedule, EMA."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import train_in_two_processes
from small_runs import TAGS, losses, metric_rows, weights
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, codec_config, lm_config, write_audio_store, write_codes_store
from torch import nn

from ssmttm import checkpoint, config
from ssmttm.errors import UserError, run_cli
from ssmttm.models import build_model
from ssmttm.training import loop, metrics, rng
from ssmttm.training.ema import EMA
from ssmttm.training.optim import build_optimizers
from ssmttm.training.optim.schedule import learning_rate
from ssmttm.training.step import TrainedModule
from ssmttm.training.tasks import codec, lm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


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


# --- train.py -------------------------------------------------------------------------------------------------------


def test_train_help_lists_experiments_and_an_error_is_one_line():
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in [*config.names("experiment"), "data.store", "resume="])
    wrong = subprocess.run([sys.executable, "train.py", "experiment=tinny"], cwd=ROOT, capture_output=True, text=True)
    assert (
        wrong.returncode == 2 and wrong.stderr == "error: no config experiment=tinny: did you mean experiment=tiny?\n"
    )
