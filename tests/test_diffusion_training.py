"""Training a denoiser: what it is told, what counts in its loss, exact resumption, what a run leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_stores import CODEBOOK_DIM, FRAMES, HOP, SAMPLE_RATE, second_stage_config, small_codec, write_codes_store
from test_resume import assert_same, everything, train_with_stops
from torch import nn

from ssmttm import audio, checkpoint
from ssmttm.codecs.metrics import frame_chroma
from ssmttm.data import open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.generation.loading import load_denoiser, open_model_folder
from ssmttm.training import loop
from ssmttm.training.step import TrainedModule, gradients, micro_batches
from ssmttm.training.tasks.diffusion import DiffusionTask

S = CODEBOOK_DIM  # channels of the sketch
PLAIN = ("diffusion.coarse_dropout=0", "diffusion.coarse_noise_aug=0", "data.caption_dropout=0")  # nothing is drawn
WISHES = ("model.tempo=true", "model.chroma=true")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def codec(root):
    return small_codec(root / "codec")


@pytest.fixture(scope="module")
def store(root, codec):
    return write_codes_store(root / "codes", codec=codec)


@pytest.fixture
def task_of(store, tmp_path):
    """A task under these settings, with weights at random."""

    def build(*overrides):
        torch.manual_seed(0)
        task = DiffusionTask(second_stage_config(store, tmp_path / "run", *overrides))
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return task

    return build


class Listener(nn.Module):
    """In a model's place: keeps what it is told, and says zeros."""

    def forward(self, noisy, time, conditions):
        self.noisy, self.time, self.conditions = noisy, time, conditions
        return torch.zeros_like(noisy)


def first_batch(task, items=4):
    return task.loader("train", items, 0, 1).batch(0)


def loss_of(task, batch, seed=0, module_name=None):
    torch.manual_seed(seed)
    named = task.losses({"model": module_name or task.model}, batch, task.counts(batch), 0)
    assert named.keys() == {"model"} and named["model"].keys() == {"denoising"}
    return named["model"]["denoising"]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- what it is told ------------------------------------------------------------------------------------------------


def test_it_is_told_the_first_latents_and_asked_for_the_others(task_of, codec):
    """The loss of a model that says nothing is the mean square of its target over real frames, by hand."""
    task, listener = task_of(*PLAIN, "diffusion.objective=flow"), Listener()
    batch = first_batch(task)
    found = loss_of(task, batch, module_name=listener)
    mean, std = (part.repeat_interleave(CODEBOOK_DIM)[:, None] for part in task.statistics)
    latents = (codec.to_latents(batch["codes"]) - mean) / std
    torch.testing.assert_close(listener.conditions.coarse_codes, latents[:, :S])
    assert torch.equal(listener.conditions.mask, batch["frame_mask"]) and not batch["frame_mask"].all()
    assert listener.conditions.text is batch["text"] and listener.conditions.has_coarse.all()
    clean, time = latents[:, S:], listener.time[:, None, None]
    noise = ((listener.noisy - (1 - time) * clean) / time).detach()
    assert abs(float(noise.mean())) < 0.2 and float(noise.std()) == pytest.approx(1, abs=0.1)
    real = batch["frame_mask"]
    torch.testing.assert_close(found, (noise - clean).transpose(1, 2)[real].square().mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", ["flow", "v"])
def test_targets_are_those_of_the_objective(task_of, objective):
    task, embeddings = task_of(*PLAIN, f"diffusion.objective={objective}"), get_objective(objective)
    batch = first_batch(task)
    latents = task.model.normalised(task.codec.to_latents(batch["codes"]))[:, S:]

    class Knowing(Listener):
        """Says what a network says that knows the clean latents."""

        def forward(self, noisy, time, conditions):
            near, far = (embeddings.noisy(latents * scale, torch.zeros_like(noisy), time) for scale in (1, 0))
            noise = (noisy - near - far) / embeddings.noisy(far, torch.ones_like(noisy), time)
            return embeddings.target(latents, noise, time)

    assert loss_of(task, batch, module_name=Knowing()) < 1e-4


def test_sketches_are_withheld_and_made_noisy_as_often_as_asked(task_of):
    task, listener = task_of("diffusion.coarse_dropout=0.3", "diffusion.coarse_noise_aug=0.8", *WISHES), Listener()
    batch = first_batch(task, 400)
    loss_of(task, batch, module_name=listener)
    told = listener.conditions
    spread = told.coarse_noise_aug
    assert (~told.has_coarse).float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert spread.min() >= 0 and spread.max() < 0.8 and spread.mean().item() == pytest.approx(0.4, abs=0.05)
    added = told.coarse_codes - task.model.normalised(task.codec.to_latents(batch["codes"]))[:, :S]
    scaled = added / spread[:, None, None]
    assert scaled.std().item() == pytest.approx(1, abs=0.03) and abs(scaled.mean().item()) < 0.02
    with torch.no_grad():
        task.validation({"model": listener}, batch, task.counts(batch), 0)
    assert listener.conditions.has_coarse.all() and not listener.conditions.coarse_noise_aug.any()


def test_it_is_told_the_tempo_and_the_melody_of_the_very_crop(store, task_of):
    """Segments of 14 to 20 frames in crops of 16."""
    overrides = ("data.frames=16", "data.tempo_dropout=0", "data.chroma_dropout=0")
    task, listener = task_of(*WISHES, *overrides), Listener()
    batch = first_batch(task, 20)
    loss_of(task, batch, module_name=listener)
    opened = open_store(store)
    row_of = {name: row for row, name in enumerate(opened.ids(np.arange(len(opened))))}
    tempo, chroma = listener.conditions.controls.tempo, listener.conditions.controls.chroma
    moved = 0
    for item, name in enumerate(batch["ids"]):
        number = int(name[1:])
        assert tempo[item] == 60 + 5 * number if number % 2 else tempo[item].isnan()
        wav, _ = audio.read(opened.audio_path(row_of[name]))
        first = int(batch["first"][item])
        moved += first > 0
        part = torch.zeros(1, 16 * HOP)
        crop = torch.as_tensor(wav)[0, first * HOP : (first + 16) * HOP]
        part[0, : len(crop)] = crop
        real = batch["frame_mask"][item]
        embeddings = frame_chroma(part, SAMPLE_RATE, 16)[0]
        torch.testing.assert_close(chroma[item][:, real], embeddings[:, real], rtol=0, atol=1e-4)
        assert chroma[item][:, ~real].isnan().all()
    assert moved > 2 and not batch["frame_mask"].all()


def test_tempo_and_melody_are_withheld_as_often_as_asked(task_of):
    overrides = ("data.tempo_dropout=0.25", "data.chroma_dropout=0.6")
    task, listener = task_of(*WISHES, *overrides), Listener()
    batch = first_batch(task, 300)
    unknown = sum(int(name[1:]) % 2 == 0 for name in batch["ids"]) / 300
    loss_of(task, batch, module_name=listener)
    tempo, chroma = listener.conditions.controls.tempo, listener.conditions.controls.chroma.isnan()
    gone = chroma.all(2).all(1)
    assert torch.equal(chroma, (gone[:, None] | ~batch["frame_mask"])[:, None].expand_as(chroma))  # all or nothing
    assert gone.float().mean().item() == pytest.approx(0.6, abs=0.1)
    assert tempo.isnan().float().mean().item() == pytest.approx(1 - 0.75 * (1 - unknown), abs=0.08)


def test_captions_are_withheld_as_often_as_asked_and_never_in_validation(store, task_of):
    task = task_of("data.caption_dropout=0.4")
    empty = torch.from_numpy(open_store(store).text("").astype(np.float32))

    def dropped(split):
        text = task.loader(split, 200, 0, 1).batch(0)["text"]
        told = [text.embeddings[item, text.mask[item]] for item in range(200)]
        return np.mean([torch.equal(given, empty) for given in told])

    assert dropped("train") == pytest.approx(0.4, abs=0.12) and dropped("valid") == 0


def test_without_sketches_the_loss_does_not_depend_on_them(task_of):
    task = task_of("diffusion.coarse_dropout=1")
    batch = first_batch(task)
    other = batch | {"codes": batch["codes"].clone()}
    other["codes"][:, 0] = (other["codes"][:, 0] + 1) % 16
    found = loss_of(task, batch)
    assert torch.equal(loss_of(task, other), found)
    found.backward()
    assert task.model.null_coarse.grad.any() and not task.model.input.weight.grad.isnan().any()
    with torch.no_grad():
        told = task_of("diffusion.coarse_dropout=0")
        assert not torch.equal(loss_of(told, other), loss_of(told, batch))


def test_with_every_sketch_its_null_is_not_trained(task_of):
    task = task_of("diffusion.coarse_dropout=0")
    loss_of(task, first_batch(task)).backward()
    assert not task.model.null_coarse.grad.any()
    assert all(p.grad is not None for p in task.model.parameters())


# --- what counts ----------------------------------------------------------------------------------------------------


def test_padding_does_not_count(task_of):
    task = task_of()
    batch = first_batch(task)
    mask = batch["frame_mask"]
    assert not mask.all() and task.counts(batch).tolist() == [mask.sum()]
    other = batch | {"codes": batch["codes"].masked_fill(~mask[:, None], 7)}
    torch.testing.assert_close(loss_of(task, other), loss_of(task, batch), rtol=1e-6, atol=1e-6)


def test_micro_batches_give_loss_and_gradients_of_the_whole(task_of):
    """Segments differ in length, so a mean of micro-batch means would differ from the mean over the batch."""
    found = []
    for size in (6, 2, 4):
        task = task_of(*PLAIN, "diffusion.objective=regression")
        trained_modules = {"model": TrainedModule(task.model, task.config.optim, Accelerator(cpu=True))}
        losses, work = gradients(task, trained_modules, micro_batches(first_batch(task, 6), size), 0, Accelerator(cpu=True))
        found.append((losses["loss"], {name: p.grad for name, p in task.model.named_parameters()}, work[:2]))
    for loss, grads, work in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-6)
        assert work == pytest.approx(found[0][2])


def test_work_is_what_was_asked_for(task_of):
    task = task_of()
    batch = first_batch(task)
    frames = int(batch["frame_mask"].sum())
    codes, seconds, flops = task.work(batch, 0)
    assert (codes, seconds) == (3 * frames, frames / 25)
    assert flops == 4 * task.model.flops(FRAMES, batch["text"].mask.shape[1])


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "falls"), [("flow", 0.85), ("v", 0.85), ("regression", 0.65)])
def test_a_run_learns_and_leaves_what_sampling_needs(store, codec, tmp_path, objective, falls):
    """Every codebook repeats the first one, so a sketch tells all the others."""
    run_dir = loop.train(second_stage_config(
        store, tmp_path / "run", f"diffusion.objective={objective}", "train.steps=60", "train.sample_every=60",
        "data.batch_size=8", "train.eval_every=20", "model.layers=attention",
    ))  # fmt: skip
    losses = [row["loss"] for row in rows(run_dir) if "loss" in row]
    assert len(losses) == 60 and np.mean(losses[-5:]) < falls * np.mean(losses[:5])
    valid = [row["valid/denoising"] for row in rows(run_dir) if "valid/denoising" in row]
    assert len(valid) == 3 and valid == sorted(valid, reverse=True)
    folder = checkpoint.latest_good(run_dir)
    statistics = DiffusionTask(second_stage_config(store, tmp_path / "other")).statistics
    for ema in (True, False):
        held = checkpoint.load_weights(folder, ema=ema)
        assert torch.equal(held["latent_mean"], statistics.mean) and torch.equal(held["latent_std"], statistics.std)
    data = checkpoint.read_state(folder)["data"]
    assert data["latents"]["fingerprint"] == statistics.fingerprint
    assert data["codec"] == {"name": codec.name, "fingerprint": codec.fingerprint}
    written = sorted((run_dir / "samples/step-00000060").iterdir())
    assert [path.name for path in written] == [f"{i}-{what}.wav" for i in range(3) for what in ("original", "painted")]
    assert {audio.read(path)[0].shape for path in written} == {(1, 38 * HOP)}  # 1.5 s in whole frames


def test_validation_is_the_same_each_time_whatever_training_draws(store, tmp_path):
    metrics = []
    for name, dropout in (("a", 0.0), ("b", 0.9)):
        frozen = ("optim.lr=0", "optim.min_lr=0", "train.steps=3", "train.eval_every=1")
        run_dir = loop.train(second_stage_config(store, tmp_path / name, *frozen, f"diffusion.coarse_dropout={dropout}"))
        metrics += [row["valid/loss"] for row in rows(run_dir) if "valid/loss" in row]
    assert len(metrics) == 6 and len(set(metrics)) == 1


# 20 segments in batches of 4: five steps an epoch.
RESUMED = (
    "train.steps=14", "model.dropout=0.2", "diffusion.coarse_dropout=0.3", "data.caption_dropout=0.3",
    "train.eval_every=10", "train.eval_batches=1", *WISHES,
)  # fmt: skip


@pytest.mark.parametrize("network", ["stack", "unet"])
def test_resumed_steps_are_unbroken_ones_twice_in_one_epoch(store, tmp_path, monkeypatch, network):
    overrides = (*RESUMED, f"model.network={network}")
    loop.train(second_stage_config(store, tmp_path / "unbroken", *overrides))
    stopped = second_stage_config(store, tmp_path / "stopped", *overrides)
    train_with_stops(stopped, DiffusionTask, (6, 8, 11), monkeypatch)
    assert_same(everything(tmp_path / "unbroken"), everything(tmp_path / "stopped"))


def test_a_run_that_starts_from_another_stores_keeps_the_statistics_of_its_weights(store, codec, tmp_path):
    """Also when it goes on, so that what it leaves can be loaded."""
    short = ("train.eval_every=0", "train.checkpoint_every=1")
    first = loop.train(second_stage_config(store, tmp_path / "first", *short, "train.steps=1"))
    other = write_codes_store(tmp_path / "other", seed=1, codec=codec)
    held = load_denoiser(open_model_folder(first, "diffusion"))
    assert DiffusionTask(second_stage_config(other, tmp_path / "task")).statistics.fingerprint != fingerprint_in(first)
    for n in (1, 2):
        second = loop.train(second_stage_config(other, tmp_path / "second", *short, f"train.steps={n}", f"init={first}"))
        loaded = load_denoiser(open_model_folder(second, "diffusion"))
        assert torch.equal(loaded.latent_mean, held.latent_mean) and torch.equal(loaded.latent_std, held.latent_std)
        assert fingerprint_in(second) == fingerprint_in(first)
        assert checkpoint.latest_good(second).name == f"step-0000000{n}"


def fingerprint_in(run_dir):
    return checkpoint.read_state(checkpoint.latest_good(run_dir))["data"]["latents"]["fingerprint"]


@pytest.fixture
def precision_afresh():
    """Accelerate keeps the precision of a process's first training for all the others."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("network", ["stack", "unet"])
def test_bf16_trains_as_float32_up_to_its_rounding(store, tmp_path, precision_afresh, network):
    losses = {}
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state()
        overrides = (f"model.network={network}", f"train.precision={precision}", "train.steps=12")
        run_dir = loop.train(second_stage_config(store, tmp_path / precision, *WISHES, *overrides))
        losses[precision] = np.array([row["loss"] for row in rows(run_dir) if "loss" in row])
        held = checkpoint.load_weights(checkpoint.latest_good(run_dir), ema=False)
        assert {value.dtype for value in held.values()} == {torch.float32}
    assert not np.array_equal(losses["bf16"], losses["fp32"])
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.n_codebooks=8"], "takes 8 codebooks of width 3.* has 4 of 3: set model.n_codebooks"),
        (["model.codebook_dim=8"], "takes 4 codebooks of width 8"),
        (["model.text_dim=384"], "text of width 384.*holds width 8: set model.text_dim=8"),
        (["model.n_coarse_codebooks=4"], "model.n_coarse_codebooks=4 of 4"),
        (["diffusion.objective=score"], "unknown diffusion.objective 'score'"),
        (["diffusion.coarse_dropout=1.5"], "diffusion.coarse_dropout=1.5 is no chance"),
        (["data.tempo_dropout=-1"], "data.tempo_dropout=-1 is no chance"),
        (["data.caption_dropout=2"], "data.caption_dropout=2 is no chance"),
        (["data.caption_dropout=true"], "data.caption_dropout=True is no chance"),
        (["diffusion.sampler=ddpm"], "no sampler 'ddpm' for objective flow"),
        (["diffusion.steps=0"], "0 sampling steps"),
        (["diffusion.steps=2.5"], "2.5 sampling steps"),
        (["diffusion.steps=null"], "None sampling steps"),
        (["diffusion.guidance_scale=high"], "diffusion.guidance_scale is high"),
        (["diffusion.guidance_scale=null"], "diffusion.guidance_scale is None"),
        (["diffusion.coarse_guidance_scale=nan"], "diffusion.coarse_guidance_scale is nan"),
        (["data.chroma_dropout=nan"], "data.chroma_dropout=nan is no chance"),
        (["model.layers=[]"], "model.layers is empty"),
        (["model.unet_mults=[]"], "model.unet_mults is empty"),
        (["diffusion.coarse_noise_aug=-1"], "diffusion.coarse_noise_aug=-1 is no spread"),
        (["diffusion.coarse_noise_aug=loud"], "diffusion.coarse_noise_aug=loud"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(store, tmp_path, overrides, says):
    with pytest.raises(UserError, match=says) as caught:
        loop.train(second_stage_config(store, tmp_path / "run", "train.steps=1", *overrides))
    assert "\n" not in str(caught.value)
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_a_store_of_another_codec_is_refused(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    info = json.loads((copy / "store.json").read_text())
    info["codec"]["fingerprint"] = "f" * 16
    (copy / "store.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="another codec"):
        loop.train(second_stage_config(copy, tmp_path / "run"))


@pytest.mark.parametrize("part", ["codec", "text"])
def test_a_store_without_codes_or_captions_is_refused(store, tmp_path, part):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    info = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(info | {part: None}))
    with pytest.raises(UserError, match="no codes and caption embeddings to learn from"):
        loop.train(second_stage_config(copy, tmp_path / "run"))


@pytest.mark.parametrize(
    ("damage", "says"), [("audio", "cannot be read"), ("rate", "4800 Hz, its codec works at 2400 Hz")]
)
def test_a_store_whose_audio_cannot_be_used_has_no_melodies(store, tmp_path, damage, says):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    if damage == "audio":
        shutil.rmtree(copy / "audio")
    else:
        info = json.loads((copy / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps(info | {"sample_rate": 4800}))
    with pytest.raises(UserError, match=says):
        loop.train(second_stage_config(copy, tmp_path / "run", "model.chroma=true", "train.steps=1"))
