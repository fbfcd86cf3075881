"""Training of a codec: the discriminator, restarts of unused codes, export."""

import json

import pytest
import torch
from small_runs import metric_rows, weights
from small_stores import codec_config, write_audio_store

from ssmttm import checkpoint
from ssmttm.codecs import TinyCodec, load_codec
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.training import loop
from ssmttm.training.tasks import codec


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


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


def test_exported_codec_loads_as_a_codec(audio_store, tmp_path):
    run_dir = loop.train(codec_config(audio_store, tmp_path / "run", "train.steps=2"))
    loaded = load_codec(export(run_dir, tmp_path / "codec", half=False))
    average = weights(run_dir, ema=True)
    for name, value in loaded.weights().items():
        torch.testing.assert_close(value, average[name])
    assert json.loads((tmp_path / "codec/card.json").read_text())["data"]["licences"] == {"CC0-1.0": 12}
