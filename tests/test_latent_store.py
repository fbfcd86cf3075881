"""Latents of a VAE in a store: preparation, crops beside the codes, and what is refused."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, SAMPLE_RATE, small_codec
from small_vaes import LATENT_CHANNELS, small_vae

from data_prep.cli import main
from ssmttm import audio
from ssmttm.data import CodesLoader, Store, StoreWriter, open_store
from ssmttm.data.loader import LatentCrops
from ssmttm.data.store import text_name
from ssmttm.data.tensorfile import map_tensors, write_tensors
from ssmttm.data.text_table import write_text_table
from ssmttm.errors import UserError

RATE = 48_000  # of the files


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Noise of lengths that are no whole number of frames."""
    folder, generator = tmp_path_factory.mktemp("music"), np.random.default_rng(0)
    for index, seconds in enumerate((4.0, 5.013, 3.499, 6.4)):
        level = np.repeat(generator.uniform(0.05, 0.3, 50), round(seconds * RATE) // 50 + 1)[: round(seconds * RATE)]
        sf.write(folder / f"{index}.flac", level * generator.standard_normal(len(level)).clip(-3, 3), RATE)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A codec of 25 frames a second at 2,400 Hz, and a VAE of 50 at 4,800 Hz."""
    folder = tmp_path_factory.mktemp("parts")
    small_codec(folder / "codec")
    small_vae(folder / "vae", ratios=(4, 4, 6), sample_rate=4800)
    return folder


def prepare(music, parts, out, *more) -> Store:
    words = ["folder", "--root", music, "--out", out, "--licence", "CC0-1.0", "--workers", "1", "--text", "none"]
    words += ["--codec", parts / "codec", "--latents", parts / "vae", "--rate", RATE, "--max-silence", "1", *more]
    main([*map(str, words)])
    return open_store(out)


@pytest.fixture(scope="module")
def store(music, parts, tmp_path_factory) -> Store:
    return prepare(music, parts, tmp_path_factory.mktemp("latents") / "store")


def test_store_holds_float16_latents_of_every_code_frame(store, parts):
    vae = small_vae(parts / "again", ratios=(4, 4, 6), sample_rate=4800)
    info = store.info["latents"]
    assert (info["fingerprint"], info["frames_per_code"], info["latent_channels"]) == (vae.fingerprint, 2, 3)
    store.require_vae(vae)
    assert len(store) == 4
    for row in range(len(store)):
        latents, codes = store.latents(row), store.codes(row)
        assert latents.dtype == np.float16 and latents.shape == (LATENT_CHANNELS, 2 * codes.shape[1])
        wav = audio.read(store.audio_path(row), 4800)[0]
        followed = torch.nn.functional.pad(wav, (0, codes.shape[1] * 192 - wav.shape[1] + 4800))[None]  # by silence
        expected = vae.encode(followed)[0, :, : latents.shape[1]].numpy()
        assert np.abs(expected - latents).max() < 1e-3 * np.abs(expected).max()
    store.verify()


def test_preparation_resumes_and_other_latents_are_another_store(music, parts, store, tmp_path):
    before = (store.path / "store.json").read_bytes()
    prepare(music, parts, store.path)
    assert (store.path / "store.json").read_bytes() == before
    small_vae(tmp_path / "vae", seed=9, ratios=(4, 4, 6), sample_rate=4800)
    with pytest.raises(UserError, match=r"prepared with other settings \(latents.name"):
        prepare(music, parts, store.path, "--latents", tmp_path / "vae")
    words = ["pack", "--root", store.path, "--out", tmp_path / "packed", "--codec", parts / "codec", "--text", "none"]
    main([*map(str, words), "--latents", str(tmp_path / "vae"), "--workers", "1"])
    packed = open_store(tmp_path / "packed")
    assert packed.info["latents"]["fingerprint"] != store.info["latents"]["fingerprint"]
    with pytest.raises(UserError, match=r"holds latents of VAE .*, but the VAE in use is"):
        packed.require_vae(small_vae(ratios=(4, 4, 6), sample_rate=4800))


def test_store_without_latents_says_so(music, parts, tmp_path):
    words = ["folder", "--root", music, "--out", tmp_path / "s", "--licence", "CC0-1.0", "--workers", "1"]
    main([*map(str, words), "--codec", str(parts / "codec"), "--text", "none", "--max-silence", "1"])
    plain = open_store(tmp_path / "s")
    assert "latents" not in plain.info and "latents" not in plain.info["config"]
    with pytest.raises(UserError, match="holds no latents of a VAE: encode it with"):
        plain.latents(0)


@pytest.mark.parametrize(("vae", "more", "words"), [
    ({"channels": 2}, (), "--latents .*: VAE .* is stereo, and the audio is mono"),
    ({"ratios": (5, 4, 6)}, (), "has 40 latents a second and codec .* 25 frames: the first must be a whole multiple"),
    ({}, ("--codec", "none"), "--latents are stored beside codes: give a --codec too"),
])  # fmt: skip
def test_vae_that_does_not_fit_is_refused_before_anything_is_written(music, parts, tmp_path, vae, more, words):
    small_vae(tmp_path / "vae", **{"ratios": (4, 4, 6), "sample_rate": 4800} | vae)
    with pytest.raises(UserError, match=words):
        prepare(music, parts, tmp_path / "s", "--latents", tmp_path / "vae", *more)
    assert not (tmp_path / "s").exists()


def test_mono_vae_or_codec_is_refused_by_a_stereo_store(music, parts, tmp_path):
    with pytest.raises(UserError, match=r"codec .* is mono, and the audio has 2 channels"):
        prepare(music, parts, tmp_path / "s", "--channels", "2")
    with pytest.raises(UserError, match=r"--latents .*: VAE .* is mono, and the audio has 2 channels"):
        prepare(music, parts, tmp_path / "s", "--channels", "2", "--codec", f"left_right:{parts / 'codec'}")
    assert not (tmp_path / "s").exists()


def test_latents_that_are_not_finite_are_named(music, parts, tmp_path):
    vae = small_vae(ratios=(4, 4, 6), sample_rate=4800)
    with torch.no_grad():
        vae.model.encoder.conv2.bias[0] = 1e5  # beyond float16
    vae.save(tmp_path / "vae")
    with pytest.raises(UserError, match=r"segment \w+-0000: VAE .* encodes it to NaN or beyond float16"):
        prepare(music, parts, tmp_path / "s", "--latents", tmp_path / "vae")


def latent_store(path, lengths, r=2, fail=None) -> Store:
    """Codes and latents that count the frames of the store; `fail` makes one of them NaN, past the writer's check."""
    codec = {"name": "fake", "fingerprint": "0" * 16, "sample_rate": SAMPLE_RATE, "frame_rate": 25.0,
             "n_codebooks": N_CODEBOOKS, "codebook_size": CODEBOOK_SIZE}  # fmt: skip
    vae = {"name": "fake", "fingerprint": "2" * 16, "latent_channels": 2, "frames_per_code": r}
    writer, first = StoreWriter(path, {}, codec, SAMPLE_RATE, shard_segments=3, latents=vae), 0
    for index, length in enumerate(lengths):
        frames = np.arange(first, first + length)
        row = {"id": f"s{index}", "split": "train", "licence": "CC0-1.0", "duration": length / 25}
        latents = np.stack([np.arange(first * r, (first + length) * r), -np.arange(length * r)]).astype(np.float32)
        writer.add(row, np.repeat(frames[None], N_CODEBOOKS, 0), latents)
        first += length
    write_text_table(path / text_name("fake"), {""}, lambda texts: [np.zeros((1, 4))], 4, "1" * 16)
    made = writer.finish(text={"name": "fake", "fingerprint": "1" * 16, "dim": 4})
    if fail is not None:
        shard = path / "shards" / "00000.safetensors"
        tensors = {name: np.array(value) for name, value in map_tensors(shard).items()}
        tensors["latents"][0, fail] = np.nan
        write_tensors(shard, tensors)
        made = open_store(path)
    return made


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), frames=st.integers(1, 20), r=st.integers(1, 3),
       batch=st.integers(0, 4))  # fmt: skip
def test_crops_of_latents_are_those_of_the_codes(tmp_path_factory, lengths, frames, r, batch):
    made = latent_store(tmp_path_factory.mktemp("s") / "store", lengths, r)
    loader = CodesLoader(made, "train", 3, frames, 0, fields={"latents": LatentCrops(made)})
    found = loader.batch(batch)
    assert found["latents"].shape == (3, 2, frames * r) and found["latents"].dtype == torch.float32
    for codes, latents, mask in zip(found["codes"], found["latents"], found["frame_mask"], strict=True):
        n = int(mask.sum())
        assert torch.equal(latents[0, : n * r : r], codes[0, :n].float() * r)
        assert not latents[:, n * r :].any()


def test_store_round_trip_and_wrong_sizes(tmp_path):
    made = latent_store(tmp_path / "s", [4, 7, 2, 5])
    assert [made.latents(row).shape for row in range(4)] == [(2, 8), (2, 14), (2, 4), (2, 10)]
    assert made.latents(3)[0].tolist() == list(range(26, 36))
    assert json.loads((tmp_path / "s" / "store.json").read_text())["latents"]["frames_per_code"] == 2
    codec, vae = made.info["codec"], made.info["latents"]
    writer = StoreWriter(tmp_path / "t", {}, codec, SAMPLE_RATE, latents=vae)
    row = {"id": "a", "split": "train", "licence": "CC0-1.0", "duration": 0.16}
    for latents in (None, np.zeros((2, 7)), np.zeros((3, 8))):
        with pytest.raises(ValueError, match=r"segment a needs latents \[2, 8\]"):
            writer.add(row, np.zeros((N_CODEBOOKS, 4), np.int64), latents)
    for value in (np.nan, np.inf, 1e6):
        with pytest.raises(UserError, match="segment a: its latents are NaN or beyond float16"):
            writer.add(row, np.zeros((N_CODEBOOKS, 4), np.int64), np.full((2, 8), value))


def test_nan_latents_of_a_store_are_named_when_they_are_read(tmp_path):
    made = latent_store(tmp_path / "s", [10], fail=7)
    loader = CodesLoader(made, "train", 1, 10, 0, fields={"latents": LatentCrops(made)})
    with pytest.raises(UserError, match="the latents of segment s0 contain NaN or infinite values: encode the store"):
        loader.batch(0)
