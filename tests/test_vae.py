"""The VAE: sizes, the same as diffusers' own class, streaming, patches, files, training, bad input."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderOobleck
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import SAMPLE_RATE, write_audio_store
from small_vaes import LATENT_CHANNELS, small_vae, vae_config, vae_fields

from data_prep.cli import main
from ssmttm import audio
from ssmttm.codecs import build_codec, load_codec
from ssmttm.codecs.losses import channel_signals, reconstruction_losses, spectral_distances
from ssmttm.codecs.vae import PatchedVAE, frames_per_code, from_patches, load_vae, to_patches
from ssmttm.data import open_store
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.training import loop
from ssmttm.training.tasks.codec import CodecTask


@settings(max_examples=25, deadline=None)
@given(
    ratios=st.lists(st.integers(2, 5), min_size=1, max_size=3), channels=st.integers(1, 2), items=st.integers(1, 3),
    samples=st.integers(1, 400), latent_channels=st.integers(1, 4),
)  # fmt: skip
def test_shapes_for_any_ratios_channels_and_lengths(ratios, channels, items, samples, latent_channels):
    vae = small_vae(ratios=ratios, channels=channels, latent_channels=latent_channels)
    wav = 0.1 * torch.randn(items, channels, samples)
    latents = vae.encode(wav)
    n_frames = -(-samples // vae.hop_length)
    assert latents.shape == (items, latent_channels, n_frames) and latents.dtype == torch.float32
    assert vae.decode(latents).shape == (items, channels, n_frames * vae.hop_length)
    output = vae.train()(wav)
    assert output.audio.shape == wav.shape and output.codes.shape == latents.shape and output.losses["kl"] >= 0


def test_kl_is_the_divergence_from_a_standard_normal():
    vae, wav = small_vae(channels=2), 0.1 * torch.randn(2, 2, 100)
    posterior = vae.model.encode(vae.pad(wav)).latent_dist
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    own = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))  # [B, c, T]
    torch.testing.assert_close(vae(wav).losses["kl"], own.sum(1).mean())


def test_equals_diffusers_own_class_from_the_same_files(tmp_path):
    vae = small_vae(tmp_path / "vae", ratios=(4, 2), channels=2)
    own = AutoencoderOobleck.from_pretrained(tmp_path / "vae")
    wav = 0.1 * torch.randn(2, 2, 8 * 20)
    with torch.no_grad():
        expected = own.encode(wav).latent_dist.mean
        assert torch.equal(vae.encode(wav), expected)
        assert torch.equal(vae.decode(expected), own.decode(expected).sample)
    assert vae.fingerprint == small_vae(ratios=(4, 2), channels=2).fingerprint
    assert vae.fingerprint != small_vae(ratios=(4, 2), channels=2, seed=6).fingerprint
    assert not torch.equal(vae.train()(wav).codes, vae(wav).codes), "training samples the latents"
    assert torch.equal(vae.eval()(wav).codes, expected)


@settings(max_examples=20, deadline=None)
@given(
    ratios=st.sampled_from([(4, 3), (3, 5), (2, 2, 5)]), cuts=st.lists(st.integers(0, 60), max_size=6),
    patch=st.integers(1, 3),
)  # fmt: skip
def test_streamed_decoding_equals_whole(ratios, cuts, patch):
    vae = PatchedVAE(small_vae(ratios=ratios, channels=2), patch)
    patches = torch.randn(1, LATENT_CHANNELS * patch, 60)
    whole = vae.decode(patches)
    edges = sorted({0, *cuts, 60})
    chunks = [patches[..., first:end] for first, end in pairwise(edges)]
    torch.testing.assert_close(torch.cat(list(vae.decode_stream(chunks)), -1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratios", [(4, 3), (2, 3, 5), (8,)])
def test_receptive_field_of_the_decoder_is_stated(ratios):
    vae = small_vae(ratios=ratios)
    before, after = vae.context
    latents = torch.randn(1, LATENT_CHANNELS, 2 * before + 9)
    changed = latents.clone()
    changed[..., before + 4] += 1
    difference = (vae.decode(changed) - vae.decode(latents)).abs()[0, 0].unflatten(0, (-1, vae.hop_length)).amax(1)
    reached = torch.nonzero(difference)[:, 0]
    assert reached.min() >= 4 and reached.max() <= before + 4 + after
    assert before - 2 <= before + 4 - int(reached.min()), "the field is not much smaller"


def test_patches_are_consecutive_latents():
    latents = torch.arange(12.0).view(1, 2, 6)
    assert to_patches(latents, 3).tolist() == [[[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]]
    assert torch.equal(from_patches(to_patches(latents, 3), 3), latents)
    vae = small_vae()
    patched, wav = PatchedVAE(vae, 2), 0.1 * torch.randn(1, 1, 12 * 7)
    assert patched.hop_length == 24 and patched.frame_rate == vae.frame_rate / 2
    assert patched.fingerprint == vae.fingerprint
    padded = torch.nn.functional.pad(wav, (0, 12))
    assert torch.equal(from_patches(patched.encode(wav), 2), vae.encode(padded))
    assert patched.encode(wav).shape == (1, 2 * LATENT_CHANNELS, 4)


def test_frames_per_code():
    assert frames_per_code(100.0, 25.0, "v", "c") == 4 and frames_per_code(25.0, 25.0, "v", "c") == 1
    for rate in (12.5, 44100 / 2048, 110.0):
        with pytest.raises(UserError, match=r"VAE v has .* latents a second and codec c 25 frames: the first must be"):
            frames_per_code(rate, 25.0, "v", "c")


def test_files_that_are_no_vae_are_user_errors(tmp_path):
    folder = tmp_path / "vae"
    vae = small_vae(folder)
    with pytest.raises(UserError, match="is a VAE, whose latents are continuous, no codec: use load_vae"):
        load_codec(folder)
    with pytest.raises(UserError, match="no such folder, nor a hub name"):
        load_vae(tmp_path / "none")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    folder.rename(pipeline / "vae")
    assert load_vae(pipeline).fingerprint == vae.fingerprint
    file = pipeline / "vae" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"encoder_hidden_size": 10}))
    with pytest.raises(UserError, match="encoder_hidden_size 10 must be twice decoder_input_channels 3"):
        load_vae(pipeline)
    file.write_text(json.dumps(fields | {"decoder_channels": 8}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vae(pipeline)
    file.write_text(json.dumps(fields | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="is not that of diffusers' AutoencoderOobleck"):
        load_vae(pipeline)
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vae(pipeline)


@pytest.mark.parametrize(("frames", "words"), [
    (torch.zeros(1, 4, 5), r"VAE oobleck takes float latents \[batch, 3, frames\], got torch.float32 \[1, 4, 5\]"),
    (torch.zeros(1, 3, 5, dtype=torch.int64), "takes float latents"),
    (torch.full((1, 3, 5), torch.nan), "VAE oobleck: the latents contain NaN or infinite values"),
])  # fmt: skip
def test_latents_that_cannot_be_decoded_are_user_errors(frames, words):
    with pytest.raises(UserError, match=words):
        small_vae().decode(frames)


def test_audio_that_does_not_fit_is_a_user_error():
    with pytest.raises(UserError, match="VAE oobleck takes a stereo waveform"):
        small_vae(channels=2).encode(torch.zeros(1, 1, 100))
    with pytest.raises(UserError, match="VAE oobleck: the waveform contains NaN"):
        small_vae().encode(torch.full((1, 1, 100), torch.nan))
    with pytest.raises(UserError, match="needs downsampling_ratios and channel_multiples of the same length"):
        build_codec(vae_fields() | {"channel_multiples": [1]})
    with pytest.raises(UserError, match=r"codec kind oobleck: .*unexpected keyword argument 'strides'"):
        build_codec(vae_fields() | {"strides": [1]})


def test_losses_of_stereo_hear_the_phase_between_the_channels():
    mono = 0.3 * torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(0))
    equal, inverted = torch.cat([mono, mono], 1), torch.cat([mono, -mono], 1)
    assert spectral_distances(equal.flatten(0, 1), inverted.flatten(0, 1), 24000)["mel"] == 0
    output = build_codec(vae_fields(channels=2))(equal)
    assert reconstruction_losses(output._replace(audio=inverted), equal, 24000)["mel"] > 0.5
    assert torch.equal(channel_signals(mono), mono[:, 0])


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("tones") / "store")


def test_training_reduces_the_losses_and_is_exported(tones, tmp_path):
    loop.train(vae_config(tones, tmp_path / "run", "train.steps=30", "train.sample_every=30", "losses.kl=0.01"))
    rows = [row for row in metric_rows(tmp_path / "run") if "loss" in row]
    assert sum(row["loss"] for row in rows[-5:]) < 0.9 * sum(row["loss"] for row in rows[:5])
    assert all(row["kl"] > 0 and {"mel", "spectrum", "flux", "pitch", "notes"} <= row.keys() for row in rows)
    weights = {"mel": 15, "spectrum": 1, "flux": 5, "pitch": 2, "notes": 4, "kl": 0.01}
    assert rows[0]["loss"] == pytest.approx(sum(weight * rows[0][name] for name, weight in weights.items()), rel=1e-4)
    samples = sorted((tmp_path / "run" / "samples").rglob("*.wav"))
    assert samples and audio.read(samples[0])[1] == SAMPLE_RATE
    vae = load_vae(export(tmp_path / "run", tmp_path / "vae"))
    assert vae.sample_rate == SAMPLE_RATE and vae.latent_channels == LATENT_CHANNELS
    card = json.loads((tmp_path / "vae" / "card.json").read_text())
    assert card["task"] == "codec" and card["data"]["licences"] == {"CC0-1.0": 12}


def test_training_resumes_bit_for_bit(tones, tmp_path, monkeypatch):
    steps = ("train.steps=6", "codec_training.adversarial_start=2")
    loop.train(vae_config(tones, tmp_path / "whole", *steps))
    train_with_stops(vae_config(tones, tmp_path / "parts", *steps), CodecTask, [3], monkeypatch)
    assert_same_runs(run_contents(tmp_path / "whole"), run_contents(tmp_path / "parts"))


def test_stereo_store_needs_a_stereo_vae(tones, tmp_path):
    with pytest.raises(UserError, match="VAE oobleck is stereo, and the audio is mono"):
        CodecTask(vae_config(tones, tmp_path / "run", "codec.audio_channels=2"))


def test_builtin_store_in_stereo(tmp_path):
    words = ["builtin", "--hours", "0.01", "--seed", "3", "--codec", "none", "--text", "none", "--workers", "1"]
    main([*words, "--out", str(tmp_path / "stereo"), "--channels", "2"])
    store = open_store(tmp_path / "stereo")
    assert store.channels == 2 and min(store.manifest["width"].to_pylist()) > 0.001
    main([*words, "--out", str(tmp_path / "mono")])
    mono = open_store(tmp_path / "mono")
    assert mono.channels == 1 and "channels" not in mono.info["config"]["source"]
    assert mono.manifest["id"].equals(store.manifest["id"])
    with pytest.raises(UserError, match=r"source.channels 2 -> None"):
        main([*words, "--out", str(tmp_path / "stereo")])
