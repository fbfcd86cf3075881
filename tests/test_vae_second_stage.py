"""A second stage of a VAE's latents: statistics, training, windows, pipelines, export, the command, and what is
refused."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_denoisers import SIZES, WIDTH, captions
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import CODEBOOK_DIM, lm_config, second_stage_config, small_codec, write_codes_store
from small_vaes import LATENT_CHANNELS, small_vae
from small_word_encoder import WordEncoder

import sample
from ssmttm import MusicPipeline, audio, checkpoint
from ssmttm.cli import main
from ssmttm.codecs import load_codec
from ssmttm.codecs.latents import channel_statistics
from ssmttm.codecs.vae import PatchedVAE, load_vae, to_patches
from ssmttm.config.model import LatentDenoiserConfig
from ssmttm.data import open_store
from ssmttm.data.tensorfile import map_tensors, write_tensors
from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export, export_two_stages
from ssmttm.generation import pretrained
from ssmttm.generation.loading import HUB_FILES
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models import LatentDenoiser
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.training import loop
from ssmttm.training.tasks.diffusion import DiffusionTask

R = 2  # latent frames of a code frame
VAE = {"ratios": (4, 4, 6), "sample_rate": 4800, "channels": 2}  # twice the codec's rate, 50 latents a second
MODEL = ("model.n_codebooks=1", f"model.vae_channels={LATENT_CHANNELS}", f"model.vae_frames={R}")
FEW = ("train.steps=4", "optim.lr=0.1", "schedule.min_lr=0.1", "schedule.warmup_steps=0", "train.eval_every=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("vae_stage")


@pytest.fixture(scope="module")
def vae(root):
    return small_vae(root / "vae", **VAE)


@pytest.fixture(scope="module")
def store(root, vae):
    return write_codes_store(root / "store", codec=small_codec(root / "codec"), vae=vae)


def config_of(store, run_dir, *overrides):
    return second_stage_config(store, run_dir, *MODEL, "data.frames=16", "diffusion.steps=3", *overrides)


# --- sizes, statistics, training


@settings(max_examples=15, deadline=None)
@given(channels=st.integers(1, 5), per_frame=st.integers(1, 3), n_coarse=st.integers(1, 3), frames=st.integers(1, 9),
       network=st.sampled_from(["stack", "unet"]))  # fmt: skip
def test_denoiser_has_the_channels_of_the_vae(channels, per_frame, n_coarse, frames, network):
    torch.manual_seed(0)
    changes = {"n_codebooks": n_coarse, "n_coarse_codebooks": n_coarse, "vae_channels": channels,
               "vae_frames": per_frame, "network": network}  # fmt: skip
    model = LatentDenoiser(LatentDenoiserConfig(**(SIZES | changes)))
    mean, std = torch.randn(n_coarse + channels), torch.rand(n_coarse + channels) + 0.5
    model.set_statistics(mean, std)
    coarse, latents = torch.randn(2, n_coarse * WIDTH, frames), torch.randn(2, channels, frames * per_frame)
    output = model(to_patches(latents, per_frame), torch.rand(2), Conditions(coarse, captions(3, 1)))
    assert output.shape == (2, channels * per_frame, frames)
    normalised = (latents - mean[n_coarse:, None]) / std[n_coarse:, None]
    patches = model.normalise(to_patches(latents, per_frame), first=n_coarse)
    torch.testing.assert_close(patches, to_patches(normalised, per_frame))
    torch.testing.assert_close(model.denormalise(patches, first=n_coarse), to_patches(latents, per_frame))
    both = model.normalise(torch.cat([coarse, to_patches(latents, per_frame)], 1))
    torch.testing.assert_close(both, torch.cat([model.normalise(coarse), patches], 1))


def test_statistics_are_those_of_each_channel_and_of_the_coarse_codes(store, tmp_path):
    task, opened = DiffusionTask(config_of(store, tmp_path)), open_store(store)
    rows = opened.indices("train")
    values = np.concatenate([opened.latents(int(row)) for row in rows], 1).astype(np.float64)
    codec = load_codec(opened.info["codec"]["name"], 1)
    coarse = torch.cat([codec.to_latents(torch.from_numpy(opened.codes(int(row))[None, :1].astype(np.int64)))
                        for row in rows], -1)  # fmt: skip
    coarse = coarse.detach()
    expected_mean = [float(coarse.mean()), *values.mean(1)]
    expected_std = [float(coarse.std(correction=0)), *values.std(1)]
    torch.testing.assert_close(task.model.latent_mean, torch.tensor(expected_mean, dtype=torch.float32))
    torch.testing.assert_close(task.model.latent_std, torch.tensor(expected_std, dtype=torch.float32))
    metadata = task.metadata()
    assert metadata["vae"] == {key: opened.vae_info[key] for key in ("name", "fingerprint")}
    before = metadata["latents"]["fingerprint"]
    task.model.latent_std[-1] *= 1.001
    assert task.metadata()["latents"]["fingerprint"] != before
    constant = channel_statistics([np.full((2, 7), 3.0, np.float16), np.full((2, 2), 3.0, np.float16)], "x")
    assert constant.mean.tolist() == [3, 3] and constant.std.max() < 1e-3


def test_loss_is_of_the_latents_given_the_coarse_codes(store, tmp_path):
    overrides = ("diffusion.coarse_dropout=0", "diffusion.coarse_noise_aug=0", "diffusion.objective=regression")
    task = DiffusionTask(config_of(store, tmp_path, *overrides))
    batch = task.loader("train", 4, 0, 1).batch(0)

    def zeros(noisy, time, conditions):
        zeros.conditions = conditions
        return torch.zeros_like(noisy)

    found = task.losses({"model": zeros}, batch, task.loss_denominators(batch), 0)["model"]["denoising"]
    patches = task.model.normalise(to_patches(batch["latents"], R), first=1)
    expected = patches.square().mean(1)[batch["frame_mask"]].mean()
    torch.testing.assert_close(found, expected)
    coarse = task.model.normalise(task.codec.to_latents(batch["codes"][:, :1]))
    assert torch.equal(zeros.conditions.coarse_latents, coarse) and coarse.shape[1] == CODEBOOK_DIM


@pytest.mark.parametrize("objective", ["flow", "regression"])
def test_loss_falls(store, tmp_path, objective):
    overrides = ("train.steps=60", f"diffusion.objective={objective}", "train.sample_every=60")
    run = loop.train(config_of(store, tmp_path / "run", *overrides))
    losses = [row["loss"] for row in metric_rows(tmp_path / "run") if "loss" in row]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    weights = checkpoint.load_weights(checkpoint.latest_good(run))
    assert weights["latent_mean"].shape == (1 + LATENT_CHANNELS,) and "channel_groups" not in weights
    assert len(list((tmp_path / "run" / "samples").rglob("*.wav"))) == 6


def test_training_resumes_bit_for_bit(store, tmp_path, monkeypatch):
    loop.train(config_of(store, tmp_path / "whole", "train.steps=6"))
    train_with_stops(config_of(store, tmp_path / "parts", "train.steps=6"), DiffusionTask, [4], monkeypatch)
    assert_same_runs(run_contents(tmp_path / "whole"), run_contents(tmp_path / "parts"))


# --- sampling


def stage_of(vae, codec, objective="flow", overlap=4, **fields) -> SecondStage:
    """A denoiser with random weights, and its statistics."""
    torch.manual_seed(0)
    sizes = SIZES | {"n_codebooks": 1, "vae_channels": LATENT_CHANNELS, "vae_frames": R} | fields
    model = LatentDenoiser(LatentDenoiserConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.set_statistics(torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.tensor([1.0, 0.5, 2.0, 1.5]))
    settings = SecondStageConfig(SamplerSettings(objective, None, 3), 2.0, 1.5, window=16, overlap=overlap)
    return SecondStage(model, codec, settings, PatchedVAE(vae, R))


@pytest.fixture(scope="module")
def codec(root, store):
    return load_codec(root / "codec", 1)


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("cuts", [[], [1, 7], [16], [20, 33]])
def test_windows_do_not_depend_on_the_chunks(vae, codec, overlap, cuts):
    stage = stage_of(vae, codec, overlap=overlap)
    coarse = torch.randint(0, 16, (1, 1, 40), generator=torch.Generator().manual_seed(1))
    text = captions(4)
    inputs = SecondStageInputs(text, captions(1), seeds=[3])
    whole = stage.generate(coarse, inputs)
    assert whole.shape == (1, LATENT_CHANNELS * R, 40) and whole.is_floating_point()
    edges = [0, *cuts, 40]
    chunks = [coarse[..., first:end] for first, end in pairwise(edges)]
    assert torch.equal(torch.cat(list(stage.generate_stream(chunks, inputs)), -1), whole)
    assert not torch.equal(stage.generate(coarse, replace(inputs, seeds=[4])), whole)
    assert not torch.equal(stage.generate((coarse + 1) % 16, inputs), whole)


def test_items_are_the_same_alone_and_in_a_batch(vae, codec):
    stage = stage_of(vae, codec)
    coarse = torch.randint(0, 16, (2, 1, 30), generator=torch.Generator().manual_seed(1))
    both = SecondStageInputs(captions(4, 2), captions(1), seeds=[3, 8])
    whole = stage.generate(coarse, both)
    for item in range(2):
        rows = slice(item, item + 1)
        assert torch.equal(stage.generate(coarse[rows], both.select_rows(rows)), whole[rows])


def test_overlapping_frames_are_known_to_the_next_window(vae, codec):
    """Windows join at frames that the later one does not change."""
    stage = stage_of(vae, codec)
    coarse = torch.randint(0, 16, (1, 1, 16))
    inputs = SecondStageInputs(captions(4), captions(1), seeds=[3])
    known = torch.randn(1, LATENT_CHANNELS * R, 4)
    window = stage.generate_window(coarse, known, inputs, 1)
    torch.testing.assert_close(window[..., :4], known, rtol=0, atol=1e-5)
    other = stage.generate_window(coarse, known + 1, inputs, 1)
    assert not torch.allclose(window[..., 4:], other[..., 4:])


# --- pipelines


@pytest.fixture(autouse=True)
def use_word_encoder(monkeypatch):
    monkeypatch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder())


@pytest.fixture(scope="module")
def first_stage(root, store):
    return loop.train(lm_config(store, root / "stage1", "model.n_codebooks=1", *FEW))


@pytest.fixture(scope="module")
def second_stage(root, store):
    return loop.train(config_of(store, root / "stage2", *FEW, "model.tempo=true", "model.chroma=true"))


@pytest.fixture(scope="module")
def exported(root, first_stage, second_stage):
    assert main.main(["export", str(first_stage), str(root / "both"), "--second-stage", str(second_stage)]) == 0
    return root / "both"


@pytest.fixture(scope="module")
def pipe(exported):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder())
        return MusicPipeline.from_pretrained(exported)


def test_audio_has_the_rate_and_channels_of_the_vae(pipe, vae):
    found = pipe(["a waltz", "drums"], duration=1.53, seeds=3)
    assert pipe.sample_rate == found.sample_rate == 4800
    assert found.audios.shape == (2, 2, round(1.53 * 4800)) and found.audios.isfinite().all()
    assert found.codes.shape == (2, LATENT_CHANNELS * R, 39)
    alone = pipe("drums", duration=1.53, seeds=4)
    assert torch.equal(alone.audios[0], found.audios[1])
    expected = PatchedVAE(vae, R).decode(found.codes[:1])[..., : found.audios.shape[-1]]
    assert torch.equal(found.audios[:1], expected)
    assert found.metadata["vae"] == {"name": pipe.decoder.name, "fingerprint": vae.fingerprint}
    shorter = pipe(["a waltz", "drums"], duration=[1.53, 0.4], seeds=3)
    assert shorter.lengths == [7344, 1920] and not shorter.audios[1, :, 1920:].any()


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_streamed_equals_whole(pipe, chunk_seconds):
    whole = pipe("strings", duration=1.57, seeds=3).audios[0]
    session = pipe.session("strings", duration=1.57, seed=3, chunk_seconds=chunk_seconds)
    assert session.channels == 2 and session.sample_rate == 4800
    parts = list(session)
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-5)


def test_long_clips_are_decoded_in_parts(pipe, monkeypatch):
    whole = pipe("strings", duration=4.0, seeds=3).audios
    monkeypatch.setattr(pretrained, "_DECODED_SECONDS", 0.7)
    torch.testing.assert_close(pipe("strings", duration=4.0, seeds=3).audios, whole, rtol=0, atol=1e-5)


def test_saved_state_goes_on_as_the_stream(pipe, tmp_path):
    session = pipe.session("strings", seed=3, chunk_seconds=0.2)
    for _ in range(3):
        session.next_chunk()
    path = pipe.save_state(tmp_path / "state.safetensors", session)
    expected = [session.next_chunk() for _ in range(4)]
    resumed = pipe.resume(pipe.load_state(path))
    for chunk in expected:
        assert torch.equal(resumed.next_chunk(), chunk)


def test_controls_reach_the_second_stage(pipe):
    plain = pipe("a march", duration=1.0, seeds=2).codes
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(4800) / 4800)[None]
    for controls in ({"bpm": 150.0}, {"melody": tone}):
        found = pipe("a march", duration=1.0, seeds=2, **controls).codes
        assert found.shape == plain.shape and not torch.equal(found, plain)


def test_export_has_the_vae_beside_and_copies_keep_it(exported, pipe, vae, first_stage, second_stage, tmp_path):
    folder = exported / "second_stage" / "vae"
    assert load_vae(folder).fingerprint == vae.fingerprint
    card = json.loads((exported / "second_stage" / "card.json").read_text())
    assert card["data"]["vae"] == {"name": "./vae", "fingerprint": vae.fingerprint}
    pipe.save_pretrained(tmp_path / "copy")
    copied = MusicPipeline.from_pretrained(tmp_path / "copy")
    expected = pipe("a march", duration=0.9, seeds=5)
    assert torch.equal(copied("a march", duration=0.9, seeds=5).audios, expected.audios)
    runs = MusicPipeline.from_pretrained(first_stage, second_stage=second_stage)
    assert runs.sample_rate == 4800 and runs.decoder.fingerprint == vae.fingerprint
    two = export(second_stage, tmp_path / "two")
    names = [path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()]
    assert all(any(fnmatch(name, pattern) for pattern in HUB_FILES) for name in names)  # a download has all files
    alone = MusicPipeline.from_pretrained(first_stage, second_stage=two)
    assert torch.equal(alone("a march", duration=0.9, seeds=5).audios, expected.audios)


def test_command_continues_repaints_loops_and_streams(exported, tmp_path, monkeypatch, capfdbinary):
    """Of the exported model; how: tests/test_vae_editing.py."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert sample.main(["x", "--checkpoint", str(exported), "--seed", "3", *arguments]) == 0

    run("--duration", "1", "--out", "clip.wav")
    run("--continue", "clip.wav", "--duration", "0.5", "--out", "longer.wav")
    run("--continue", "clip.wav", "--repaint", "0.4:0.8", "--out", "repaired.wav")
    run("--duration", "4", "--loop", "--out", "loop.wav")
    capfdbinary.readouterr()
    run("--continue", "clip.wav", "--duration", "0.5", "--stream", "-", "--format", "pcm")
    streamed = np.frombuffer(capfdbinary.readouterr().out, "<i2")
    clip, longer, repaired, loop = (
        audio.read(f"{name}.wav", 4800, mono=False)[0] for name in ("clip", "longer", "repaired", "loop")
    )
    assert (longer.shape, repaired.shape, loop.shape) == ((2, 7200), (2, 4800), (2, 19200))
    np.testing.assert_allclose(streamed.reshape(-1, 2).T / 2**15, longer.numpy(), atol=2 / 2**15)
    differs = (repaired != clip).any(0)
    assert differs[1920:3840].float().mean() > 0.9 and not differs[:1536].any() and not differs[4224:].any()
    assert json.loads(Path("repaired.json").read_text())["repaint"]


# --- what is refused


def test_another_vae_is_refused(root, store, exported, first_stage, second_stage, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "copy")
    small_vae(seed=6, **VAE).save(moved / "second_stage" / "vae")
    with pytest.raises(UserError, match=r"was trained with the latents of VAE './vae' \(\w+\), got \w+: restore"):
        MusicPipeline.from_pretrained(moved)
    kept = (root / "vae").rename(root / "kept")
    try:
        small_vae(root / "vae", seed=6, **VAE)
        with pytest.raises(
            UserError, match=r"holds latents of VAE .* but the VAE in use is .*: use that VAE, or encode"
        ):
            DiffusionTask(config_of(store, tmp_path))
        with pytest.raises(UserError, match=r"was trained with the latents of VAE .*, which is now \w+: restore the"):
            export(second_stage, tmp_path / "out")
        with pytest.raises(UserError, match="restore the original"):
            export_two_stages(first_stage, second_stage, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(root / "vae", ignore_errors=True)
        kept.rename(root / "vae")


def test_store_without_latents_or_with_nan_is_refused(root, store, tmp_path):
    plain = write_codes_store(tmp_path / "plain", codec=small_codec(root / "codec"))
    with pytest.raises(UserError, match="holds no latents of a VAE: encode it with"):
        DiffusionTask(config_of(plain, tmp_path))
    damaged = shutil.copytree(store, tmp_path / "damaged")
    shard = damaged / "shards" / "00000.safetensors"
    tensors = {name: np.array(value) for name, value in map_tensors(shard).items()}
    tensors["latents"][1, 5] = np.nan
    write_tensors(shard, tensors)
    with pytest.raises(UserError, match="its latents contain NaN or infinite values: encode the store again"):
        DiffusionTask(config_of(damaged, tmp_path))


@pytest.mark.parametrize(("overrides", "words"), [
    (["model.vae_channels=5"], "takes 5 channels of a VAE and 2 frames of them in a code frame, .* has 3 and 2: set"),
    (["model.vae_frames=1"], "takes 3 channels of a VAE and 1 frames of them in a code frame, .* has 3 and 2: set"),
    (["model.n_codebooks=2"], "all codebooks of the model are coarse ones: set model.n_codebooks=1"),
    (["model.vae_channels=-1"], "model.vae_channels must be at least 0"),
    (["model.vae_frames=0"], "vae_frames"),
    (["model.codebook_dim=8"], "takes 1 codebooks of width 8"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(store, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        DiffusionTask(config_of(store, tmp_path, *overrides))


def test_store_of_codes_and_latents_trains_a_denoiser_of_codes_as_before(root, store, tmp_path):
    plain = write_codes_store(tmp_path / "plain", codec=small_codec(root / "codec"))
    runs = [loop.train(second_stage_config(path, tmp_path / path.name, "train.steps=3")) for path in (store, plain)]
    first, second = (checkpoint.load_weights(checkpoint.latest_good(run)) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
