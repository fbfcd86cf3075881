"""Training of the denoiser: conditions and their dropout, losses, exact resume, checkpoints, invalid settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import CODEBOOK_DIM, FRAMES, HOP, SAMPLE_RATE, second_stage_config, small_codec, write_codes_store
from torch import nn

from ssmttm import audio, checkpoint
from ssmttm.audio.features import frame_chroma
from ssmttm.data import open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.generation.loading import load_denoiser, open_model_folder
from ssmttm.training import loop
from ssmttm.training.step import TrainedModule, gradients, micro_batches
from ssmttm.training.tasks.diffusion import DiffusionTask

S = CODEBOOK_DIM  # coarse channels
NO_DROPOUT = ("diffusion.coarse_dropout=0", "diffusion.coarse_noise_aug=0", "data.caption_dropout=0")
CONTROLS = ("model.tempo=true", "model.chroma=true")


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
    """A task with these overrides and random weights."""

    def build(*overrides):
        torch.manual_seed(0)
        task = DiffusionTask(second_stage_config(store, tmp_path / "run", *overrides))
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return task

    return build


class RecordingModel(nn.Module):
    """Stands in for the denoiser: keeps its inputs and predicts zeros."""

    def forward(self, noisy, time, conditions):
        self.noisy, self.time, self.conditions = noisy, time, conditions
        return torch.zeros_like(noisy)


def first_batch(task, items=4):
    return task.loader("train", items, 0, 1).batch(0)


def loss_of(task, batch, seed=0, model=None):
    torch.manual_seed(seed)
    named = task.losses({"model": model or task.model}, batch, task.loss_denominators(batch), 0)
    assert named.keys() == {"model"} and named["model"].keys() == {"denoising"}
    return named["model"]["denoising"]


# --- conditions -----------------------------------------------------------------------------------------------------


def test_denoiser_gets_the_coarse_latents_and_predicts_the_others(task_of, codec):
    """The loss of a model that predicts zeros is the mean square of its target over valid frames."""
    task, model = task_of(*NO_DROPOUT, "diffusion.objective=flow"), RecordingModel()
    batch = first_batch(task)
    found = loss_of(task, batch, model=model)
    mean, std = (part.repeat_interleave(CODEBOOK_DIM)[:, None] for part in task.statistics)
    latents = (codec.to_latents(batch["codes"]) - mean) / std
    torch.testing.assert_close(model.conditions.coarse_latents, latents[:, :S])
    assert torch.equal(model.conditions.mask, batch["frame_mask"]) and not batch["frame_mask"].all()
    assert model.conditions.text is batch["text"] and model.conditions.has_coarse.all()
    clean, time = latents[:, S:], model.time[:, None, None]
    noise = ((model.noisy - (1 - time) * clean) / time).detach()
    assert abs(float(noise.mean())) < 0.2 and float(noise.std()) == pytest.approx(1, abs=0.1)
    valid = batch["frame_mask"]
    torch.testing.assert_close(found, (noise - clean).transpose(1, 2)[valid].square().mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", ["flow", "v"])
def test_loss_target_is_that_of_the_objective(task_of, objective):
    task, process = task_of(*NO_DROPOUT, f"diffusion.objective={objective}"), get_objective(objective)
    batch = first_batch(task)
    latents = task.model.normalise(task.codec.to_latents(batch["codes"]))[:, S:]

    class ExactModel(RecordingModel):
        """Predicts the exact target, from the clean latents."""

        def forward(self, noisy, time, conditions):
            near, far = (process.add_noise(latents * scale, torch.zeros_like(noisy), time) for scale in (1, 0))
            noise = (noisy - near - far) / process.add_noise(far, torch.ones_like(noisy), time)
            return process.target(latents, noise, time)

    assert loss_of(task, batch, model=ExactModel()) < 1e-4


def test_coarse_latents_are_dropped_and_noised_at_the_configured_rates(task_of):
    task, model = task_of("diffusion.coarse_dropout=0.3", "diffusion.coarse_noise_aug=0.8", *CONTROLS), RecordingModel()
    batch = first_batch(task, 400)
    loss_of(task, batch, model=model)
    conditions = model.conditions
    noise_level = conditions.coarse_noise_aug
    assert (~conditions.has_coarse).float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert noise_level.min() >= 0 and noise_level.max() < 0.8
    assert noise_level.mean().item() == pytest.approx(0.4, abs=0.05)
    added = conditions.coarse_latents - task.model.normalise(task.codec.to_latents(batch["codes"]))[:, :S]
    scaled = added / noise_level[:, None, None]
    assert scaled.std().item() == pytest.approx(1, abs=0.03) and abs(scaled.mean().item()) < 0.02
    with torch.no_grad():
        batch = task.loader("valid", 20, 0, 1).batch(0)
        task.validation({"model": model}, batch, task.loss_denominators(batch), 0)
    assert model.conditions.has_coarse.all() and not model.conditions.coarse_noise_aug.any()


def test_controls_are_the_tempo_and_the_chroma_of_the_crop(store, task_of):
    """Segments of 14 to 20 frames in crops of 16."""
    overrides = ("data.frames=16", "data.tempo_dropout=0", "data.chroma_dropout=0", "data.caption_dropout=0")
    task, model = task_of(*CONTROLS, *overrides), RecordingModel()
    batch = first_batch(task, 20)
    loss_of(task, batch, model=model)
    opened = open_store(store)
    row_of = {name: row for row, name in enumerate(opened.ids(np.arange(len(opened))))}
    tempo, chroma = model.conditions.controls.bpm, model.conditions.controls.chroma
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
        valid = batch["frame_mask"][item]
        expected = frame_chroma(part, SAMPLE_RATE, 16)[0]
        torch.testing.assert_close(chroma[item][:, valid], expected[:, valid], rtol=0, atol=1e-4)
        assert chroma[item][:, ~valid].isnan().all()
    assert moved > 2 and not batch["frame_mask"].all()


def test_tempo_and_chroma_are_dropped_at_the_configured_rates(task_of):
    overrides = ("data.tempo_dropout=0.25", "data.chroma_dropout=0.6")
    task, model = task_of(*CONTROLS, *overrides), RecordingModel()
    batch = first_batch(task, 300)
    unknown = sum(int(name[1:]) % 2 == 0 for name in batch["ids"]) / 300
    loss_of(task, batch, model=model)
    tempo, chroma = model.conditions.controls.bpm, model.conditions.controls.chroma.isnan()
    dropped = chroma.all(2).all(1)
    assert torch.equal(chroma, (dropped[:, None] | ~batch["frame_mask"])[:, None].expand_as(chroma))  # all or nothing
    assert dropped.float().mean().item() == pytest.approx(0.6, abs=0.1)
    assert tempo.isnan().float().mean().item() == pytest.approx(1 - 0.75 * (1 - unknown), abs=0.08)


def test_captions_are_dropped_in_training_only(store, task_of):
    task = task_of("data.caption_dropout=0.4")
    empty = torch.from_numpy(open_store(store).text("").astype(np.float32))

    def dropped_fraction(split):
        text = task.loader(split, 200, 0, 1).batch(0)["text"]
        embeddings = [text.embeddings[item, text.mask[item]] for item in range(200)]
        return np.mean([torch.equal(embedding, empty) for embedding in embeddings])

    assert dropped_fraction("train") == pytest.approx(0.4, abs=0.12) and dropped_fraction("valid") == 0


def test_loss_without_coarse_latents_does_not_depend_on_them(task_of):
    task = task_of("diffusion.coarse_dropout=1")
    batch = first_batch(task)
    other = batch | {"codes": batch["codes"].clone()}
    other["codes"][:, 0] = (other["codes"][:, 0] + 1) % 16
    found = loss_of(task, batch)
    assert torch.equal(loss_of(task, other), found)
    found.backward()
    assert task.model.null_coarse.grad.any() and not task.model.input.weight.grad.isnan().any()
    with torch.no_grad():
        conditioned = task_of("diffusion.coarse_dropout=0")
        batch = first_batch(conditioned)
        other = batch | {"codes": other["codes"]}
        assert not torch.equal(loss_of(conditioned, other), loss_of(conditioned, batch))


def test_null_coarse_has_no_gradient_without_coarse_dropout(task_of):
    task = task_of("diffusion.coarse_dropout=0")
    loss_of(task, first_batch(task)).backward()
    assert not task.model.null_coarse.grad.any()
    assert all(p.grad is not None for p in task.model.parameters())


# --- losses and throughput ------------------------------------------------------------------------------------------


def test_padding_does_not_change_the_loss(task_of):
    task = task_of()
    batch = first_batch(task)
    mask = batch["frame_mask"]
    assert not mask.all() and task.loss_denominators(batch).tolist() == [mask.sum()]
    other = batch | {"codes": batch["codes"].masked_fill(~mask[:, None], 7)}
    torch.testing.assert_close(loss_of(task, other), loss_of(task, batch), rtol=1e-6, atol=1e-6)


def test_draws_do_not_depend_on_ranks_micro_batches_or_order(task_of):
    """Dropout, levels, times and noise of a global batch, bit for bit."""
    overrides = ("data.caption_dropout=0.5", "data.tempo_dropout=0.5", "data.chroma_dropout=0.5")
    task = task_of(*overrides, "diffusion.coarse_dropout=0.5", *CONTROLS)
    for n in (0, 3, 5, 3):
        whole = task.loader("train", 6, 0, 1).batch(n)
        ranks = [task.loader("train", 6, rank, 2).batch(n) for rank in (0, 1)]
        for parts in (ranks, micro_batches(whole, 1), micro_batches(whole, 4)):
            noise = [part["draws"].noise_like(torch.zeros(len(part["ids"]), 12, 20)) for part in parts]
            assert torch.equal(torch.cat(noise), whole["draws"].noise_like(torch.zeros(6, 12, 20)))
            for k in range(3):
                assert torch.equal(torch.cat([part["draws"][k] for part in parts]), whole["draws"][k])
            for name in ("bpm", "chroma"):
                joined = torch.cat([getattr(part["controls"], name) for part in parts])
                torch.testing.assert_close(joined, getattr(whole["controls"], name), rtol=0, atol=1e-6, equal_nan=True)
            assert [caption for part in parts for caption in part["captions"]] == whole["captions"]


def test_noise_and_times_differ_between_epochs_with_fixed_crops(task_of):
    """The other choices do not."""
    task = task_of("data.fixed_crops=true", "diffusion.coarse_dropout=0.5")
    first, second = (task.loader("train", 20, 0, 1).batch(n) for n in (0, 1))  # an epoch each, in another order
    same = [second["ids"].index(name) for name in first["ids"]]
    assert torch.equal(first["draws"].has_coarse, second["draws"].has_coarse[same])
    assert torch.equal(first["first"], second["first"][same])
    for k in (1, 2):
        assert not (first["draws"][k] == second["draws"][k][same]).any()
    assert not set(first["draws"].noise_seeds) & set(second["draws"].noise_seeds)


@pytest.mark.parametrize("objective", ["flow", "v", "regression"])
def test_micro_batches_give_loss_and_gradients_of_the_batch(task_of, objective):
    """With dropout and noise. Segments differ in length, so a mean of micro-batch means would be another one."""
    found = []
    for size in (6, 2, 4):
        task = task_of(
            "data.caption_dropout=0.5", "diffusion.coarse_dropout=0.5", *CONTROLS, f"diffusion.objective={objective}"
        )
        trained_modules = {"model": TrainedModule("model", task.model, task.config.optim, Accelerator(cpu=True))}
        micro = micro_batches(first_batch(task, 6), size)
        losses, throughput = gradients(task, trained_modules, micro, 0, Accelerator(cpu=True))
        found.append((losses["loss"], {name: p.grad for name, p in task.model.named_parameters()}, throughput[:2]))
    for loss, grads, throughput in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-6)
        assert throughput == pytest.approx(found[0][2])


def test_throughput_counts_fine_codes_seconds_and_flops(task_of):
    task = task_of()
    batch = first_batch(task)
    frames = int(batch["frame_mask"].sum())
    codes, seconds, flops = task.throughput(batch, 0)
    assert (codes, seconds) == (3 * frames, frames / 25)
    assert flops == 4 * task.model.flops(FRAMES, batch["text"].mask.shape[1])


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "falls"), [("flow", 0.85), ("v", 0.85), ("regression", 0.65)])
def test_diffusion_run_learns_and_saves_statistics_and_samples(store, codec, tmp_path, objective, falls):
    """Every codebook repeats the first one, so the coarse codes determine the others."""
    run_dir = loop.train(second_stage_config(
        store, tmp_path / "run", f"diffusion.objective={objective}", "train.steps=60", "train.sample_every=60",
        "data.batch_size=8", "train.eval_every=20", "model.layers=attention",
    ))  # fmt: skip
    losses = [row["loss"] for row in metric_rows(run_dir) if "loss" in row]
    assert len(losses) == 60 and np.mean(losses[-5:]) < falls * np.mean(losses[:5])
    valid = [row["valid/denoising"] for row in metric_rows(run_dir) if "valid/denoising" in row]
    assert len(valid) == 3 and valid == sorted(valid, reverse=True)
    folder = checkpoint.latest_good(run_dir)
    statistics = DiffusionTask(second_stage_config(store, tmp_path / "other")).statistics
    for ema in (True, False):
        saved = checkpoint.load_weights(folder, ema=ema)
        assert torch.equal(saved["latent_mean"], statistics.mean) and torch.equal(saved["latent_std"], statistics.std)
    data = checkpoint.read_state(folder)["data"]
    assert data["latents"]["fingerprint"] == statistics.fingerprint
    assert data["codec"] == {"name": codec.name, "fingerprint": codec.fingerprint}
    written = sorted((run_dir / "samples/step-00000060").iterdir())
    kinds = ("generated", "original")
    assert [path.name for path in written] == [f"{i}-{kind}.wav" for i in range(3) for kind in kinds]
    assert {audio.read(path)[0].shape for path in written} == {(1, 38 * HOP)}  # 1.5 s in whole frames


def test_validation_does_not_depend_on_the_training_draws(store, tmp_path):
    metrics = []
    for name, dropout in (("a", 0.0), ("b", 0.9)):
        frozen = ("optim.lr=0", "schedule.min_lr=0", "train.steps=3", "train.eval_every=1")
        overrides = (*frozen, f"diffusion.coarse_dropout={dropout}")
        run_dir = loop.train(second_stage_config(store, tmp_path / name, *overrides))
        metrics += [row["valid/loss"] for row in metric_rows(run_dir) if "valid/loss" in row]
    assert len(metrics) == 6 and len(set(metrics)) == 1


# 20 segments in batches of 4: five steps per epoch.
RESUMED = (
    "train.steps=14", "model.dropout=0.2", "diffusion.coarse_dropout=0.3", "data.caption_dropout=0.3",
    "train.eval_every=10", "train.eval_batches=1", *CONTROLS,
)  # fmt: skip


@pytest.mark.parametrize("network", ["stack", "unet"])
def test_diffusion_run_resumed_three_times_equals_uninterrupted_run(store, tmp_path, monkeypatch, network):
    overrides = (*RESUMED, f"model.network={network}")
    loop.train(second_stage_config(store, tmp_path / "uninterrupted", *overrides))
    stopped = second_stage_config(store, tmp_path / "stopped", *overrides)
    train_with_stops(stopped, DiffusionTask, (6, 8, 11), monkeypatch)
    assert_same_runs(run_contents(tmp_path / "uninterrupted"), run_contents(tmp_path / "stopped"))


def test_init_keeps_the_latent_statistics_of_its_weights(store, codec, tmp_path):
    """Also after a resume."""
    short = ("train.eval_every=0", "train.checkpoint_every=1")
    first = loop.train(second_stage_config(store, tmp_path / "first", *short, "train.steps=1"))
    other = write_codes_store(tmp_path / "other", seed=1, codec=codec)
    loaded_first = load_denoiser(open_model_folder(first, "diffusion"))
    assert DiffusionTask(second_stage_config(other, tmp_path / "task")).statistics.fingerprint != fingerprint_in(first)
    for n in (1, 2):
        overrides = (*short, f"train.steps={n}", f"init={first}")
        second = loop.train(second_stage_config(other, tmp_path / "second", *overrides))
        loaded = load_denoiser(open_model_folder(second, "diffusion"))
        assert torch.equal(loaded.latent_mean, loaded_first.latent_mean)
        assert torch.equal(loaded.latent_std, loaded_first.latent_std)
        assert fingerprint_in(second) == fingerprint_in(first)
        assert checkpoint.latest_good(second).name == f"step-0000000{n}"


def fingerprint_in(run_dir):
    return checkpoint.read_state(checkpoint.latest_good(run_dir))["data"]["latents"]["fingerprint"]


@pytest.fixture
def reset_precision():
    """Accelerate keeps the precision of a process's first training for all later ones."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("network", ["stack", "unet"])
def test_bf16_training_matches_float32_up_to_rounding(store, tmp_path, reset_precision, network):
    losses = {}
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state()
        overrides = (f"model.network={network}", f"train.precision={precision}", "train.steps=12")
        run_dir = loop.train(second_stage_config(store, tmp_path / precision, *CONTROLS, *overrides))
        losses[precision] = np.array([row["loss"] for row in metric_rows(run_dir) if "loss" in row])
        saved = checkpoint.load_weights(checkpoint.latest_good(run_dir), ema=False)
        assert {value.dtype for value in saved.values()} == {torch.float32}
    assert not np.array_equal(losses["bf16"], losses["fp32"])
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)


# --- invalid settings and stores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.n_codebooks=8"], "takes 8 codebooks of width 3.* has 4 of 3: set model.n_codebooks"),
        (["model.codebook_dim=8"], "takes 4 codebooks of width 8"),
        (["model.text_dim=384"], "text of width 384.*of width 8: set model.text_dim=8"),
        (["model.n_coarse_codebooks=4"], "model.n_coarse_codebooks must be at least 1 and below n_codebooks=4, got 4"),
        (["diffusion.objective=score"], "unknown diffusion.objective 'score'"),
        (["diffusion.coarse_dropout=1.5"], r"diffusion.coarse_dropout must be in \[0, 1\], got 1.5"),
        (["data.tempo_dropout=-1"], r"data.tempo_dropout must be in \[0, 1\], got -1"),
        (["data.caption_dropout=2"], r"data.caption_dropout must be in \[0, 1\], got 2"),
        (["data.caption_dropout=true"], r"data.caption_dropout must be a number, got true"),
        (["diffusion.sampler=ddpm"], "unknown sampler 'ddpm' for objective flow"),
        (["diffusion.steps=0"], r"sampling steps must be in \[1, 1000\], got 0"),
        (["diffusion.steps=2.5"], "diffusion.steps must be an integer, got 2.5"),
        (["diffusion.steps=null"], "diffusion.steps must be an integer, got null"),
        (["diffusion.guidance_scale=high"], "diffusion.guidance_scale must be a number, got high"),
        (["diffusion.guidance_scale=null"], "diffusion.guidance_scale must be a number, got null"),
        (["diffusion.coarse_guidance_scale=nan"], "diffusion.coarse_guidance_scale must be at least 0 .* got nan"),
        (["data.chroma_dropout=nan"], r"data.chroma_dropout must be in \[0, 1\], got nan"),
        (["model.layers=[]"], "model.layers is empty"),
        (["model.unet_mults=[]"], "model.unet_mults is empty"),
        (["diffusion.coarse_noise_aug=-1"], "diffusion.coarse_noise_aug must be at least 0, got -1"),
        (["diffusion.coarse_noise_aug=loud"], "diffusion.coarse_noise_aug must be a number, got loud"),
    ],
)
def test_invalid_settings_are_one_clear_line(store, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        loop.train(second_stage_config(store, tmp_path / "run", "train.steps=1", *overrides))
    assert "\n" not in str(caught.value)
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_store_of_another_codec_is_rejected(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    info = json.loads((copy / "store.json").read_text())
    info["codec"]["fingerprint"] = "f" * 16
    (copy / "store.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"was encoded by codec .* encode the store again"):
        loop.train(second_stage_config(copy, tmp_path / "run"))


@pytest.mark.parametrize("part", ["codec", "text"])
def test_store_without_codes_or_captions_is_rejected(store, tmp_path, part):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    info = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(info | {part: None}))
    with pytest.raises(UserError, match="no codes and caption embeddings to learn from"):
        loop.train(second_stage_config(copy, tmp_path / "run"))


@pytest.mark.parametrize(
    ("damage", "message"), [("audio", "cannot be read"), ("rate", "4800 Hz, its codec works at 2400 Hz")]
)
def test_chroma_needs_readable_audio_at_the_codec_rate(store, tmp_path, damage, message):
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    if damage == "audio":
        shutil.rmtree(copy / "audio")
    else:
        info = json.loads((copy / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps(info | {"sample_rate": 4800}))
    with pytest.raises(UserError, match=message):
        loop.train(second_stage_config(copy, tmp_path / "run", "model.chroma=true", "train.steps=1"))
