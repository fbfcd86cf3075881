"""Codecs: the contract of every codec, fingerprints, loading, the embedded codec's quality."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from small_codecs import small_codec, tones

from data_prep.builtin import compose
from data_prep.builtin.synth import render
from ssmttm.codecs import TinyCodecConfig, build_codec, load_codec
from ssmttm.codecs.autoencoder import weights_fingerprint
from ssmttm.codecs.metrics import codec_quality
from ssmttm.config import names
from ssmttm.errors import UserError

# Contracts


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 4000), batch=st.integers(1, 2))
def test_codec_rounds_any_length_up_to_full_frames(samples, batch):
    codec = small_codec().eval()
    codes = codec.encode(torch.randn(batch, 1, samples) * 0.1)
    frames = -(-samples // 320)
    assert codes.shape == (batch, 3, frames) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 32
    wav = codec.decode(codes)
    assert wav.shape == (batch, 1, frames * 320) and wav.dtype == torch.float32 and torch.isfinite(wav).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ahead=st.sampled_from([(0, 0), (1, 0), (2, 3)]))
def test_decode_stream_equals_decode_for_any_chunking(data, ahead):
    codec = small_codec(decoder_look_ahead=ahead).eval()
    sizes = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=6))
    codes = torch.randint(0, 32, (2, 3, sum(sizes)))
    chunks = list(codec.decode_stream(iter(codes.split(sizes, dim=-1))))
    if not sum(sizes):
        assert not chunks
        return
    whole = codec.decode(codes)
    assert whole.std() > 1e-3
    torch.testing.assert_close(torch.cat(chunks, dim=-1), whole, atol=1e-5, rtol=0)


def test_decoder_receptive_field_is_within_context():
    codec = small_codec().eval()
    history, look_ahead = codec.context
    codes = torch.randint(0, 32, (1, 3, 60))
    changed = codes.clone()
    changed[..., 40] = (codes[..., 40] + 1) % 32
    changed_frames = (codec.decode(codes) != codec.decode(changed))[0, 0].view(60, 320).any(dim=1).nonzero()[:, 0]
    assert changed_frames.min() >= 40 - look_ahead and changed_frames.max() <= 40 + history
    assert codec.look_ahead_ms == pytest.approx(look_ahead * 40)


def test_decode_stream_waits_for_look_ahead_only():
    codec = small_codec().eval()
    consumed = []

    def chunks():
        for i in range(30):
            consumed.append(i)
            yield torch.zeros(1, 3, 1, dtype=torch.int64)

    assert next(codec.decode_stream(chunks())).shape[-1] == 320
    assert len(consumed) == codec.context[1] + 1


def test_latents_convert_back_to_codes():
    codec = small_codec().eval()
    codes = torch.randint(0, 32, (2, 3, 9))
    latents = codec.to_latents(codes)
    assert latents.shape == (2, codec.latent_channels, 9) == (2, 12, 9)
    assert torch.equal(codec.from_latents(latents), codes)
    assert torch.equal(codec.from_latents(latents * 1.3 + 1e-4), codes)


def test_keep_codebooks_uses_the_first_codebooks():
    codec = small_codec().eval()
    wav = tones(1, 3200)
    all_codes = codec.encode(wav)
    assert torch.equal(codec.keep_codebooks(2).encode(wav), all_codes[:, :2])
    assert codec.to_latents(all_codes[:, :2]).shape[1] == codec.latent_channels == 8
    assert codec.decode(all_codes[:, :2]).shape == (1, 1, 3200)
    with pytest.raises(UserError, match=r"must be in \[1, 3\]"):
        codec.keep_codebooks(4)


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.full((1, 1, 500), float("nan")), "NaN"),
        (torch.full((1, 1, 500), float("inf")), "infinite"),
        (torch.zeros(1, 2, 500), "mono"),
        (torch.zeros(1, 500), "mono"),
        (torch.zeros(1, 1, 0), "mono"),
        (torch.zeros(1, 1, 500, dtype=torch.int16), "float waveform"),
    ],
)
def test_encode_rejects_invalid_waveform_with_one_line(wav, message):
    with pytest.raises(UserError, match=message) as error:
        small_codec().eval().encode(wav)
    assert "\n" not in str(error.value)


def test_codec_rejects_invalid_codes_sample_rates_and_configs():
    codec = small_codec().eval()
    with pytest.raises(UserError, match="special token"):
        codec.decode(torch.full((1, 3, 4), 32))
    with pytest.raises(UserError, match="integer codes"):
        codec.decode(torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(UserError, match="resample"):
        codec.check_sample_rate(44100)
    with pytest.raises(UserError, match="window"):
        TinyCodecConfig(window=1000)
    with pytest.raises(UserError, match="sample_rte"):
        build_codec({"kind": "tiny", "sample_rte": 1})
    with pytest.raises(UserError, match="choose from tiny"):
        build_codec({"kind": "flac"})


# Files


def test_codec_decodes_the_same_after_save_and_load(tmp_path):
    codec = small_codec().train()
    codec(tones(2, 3200))
    codec.eval().save(tmp_path / "a", half=False)
    loaded = load_codec(tmp_path / "a")
    assert loaded.fingerprint == codec.fingerprint and not loaded.training and loaded.name == "a"
    codes = torch.randint(0, 32, (1, 3, 12))
    assert torch.equal(loaded.decode(codes), codec.decode(codes))

    codec.save(tmp_path / "half")
    half = load_codec(tmp_path / "half")
    assert half.head.project.weight.dtype == torch.float32 and half.fingerprint != codec.fingerprint
    torch.testing.assert_close(half.decode(codes), codec.decode(codes), atol=2e-3, rtol=0)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "a")]
    assert sizes[0] < 0.6 * sizes[1]


def test_codec_fingerprint_depends_on_weights_not_usage_counts():
    codec = small_codec().train()
    codec(tones(1, 3200))
    before = codec.fingerprint
    codec.quantiser.usage += 1
    assert codec.fingerprint == before and len(before) == 16
    codec.head.project.bias.data[0] += 1e-3
    assert codec.fingerprint != before


@torch.no_grad()
def add_in_place(codec):
    codec.down.weight[3, 4] += 1e-4


@torch.no_grad()
def exchange_in_place(codec):
    codec.quantiser.codebooks[:, [0, 1]] = codec.quantiser.codebooks[:, [1, 0]]


def add_to_data(codec):
    codec.down.weight.data[3, 4] += 1e-4


def load_other_weights(codec):
    codec.load_state_dict({name: value + 1 for name, value in codec.state_dict().items()})


def take_a_fused_step(codec):  # counts no version of the weights
    codec.down.weight.grad = torch.ones_like(codec.down.weight)
    torch.optim.AdamW(codec.parameters(), lr=1e-4, fused=True).step()


def replace_a_parameter(codec):
    codec.down = torch.nn.Linear(codec.down.in_features, codec.down.out_features)


@pytest.mark.parametrize(
    "change",
    [add_in_place, exchange_in_place, add_to_data, load_other_weights, take_a_fused_step, replace_a_parameter],
)
def test_codec_fingerprint_is_hashed_once_until_the_weights_change(change, monkeypatch):
    hashed = []

    def count_and_hash(weights):
        hashed.append(weights_fingerprint(weights))
        return hashed[-1]

    monkeypatch.setattr("ssmttm.codecs.autoencoder.weights_fingerprint", count_and_hash)
    codec = small_codec().eval()
    before = codec.fingerprint
    codec.encode(tones(1, 3200))
    assert codec.fingerprint == before and len(hashed) == 1
    change(codec)
    assert codec.fingerprint == weights_fingerprint(codec.weights()) != before and len(hashed) == 2
    assert codec.train().eval().fingerprint == hashed[1] and len(hashed) == 2


def test_load_codec_rejects_missing_and_damaged_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_codec(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config.json"):
        load_codec(tmp_path)
    small_codec().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_width": 64}))
    with pytest.raises(UserError, match="do not fit"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(UserError, match="cannot be read"):
        load_codec(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no config\.json or no model\.safetensors"):
        load_codec(tmp_path)


@pytest.mark.parametrize("name", names("codec"))
def test_codec_configs_build(name):
    from ssmttm.config import load

    config = OmegaConf.to_container(load("task=codec", f"codec={name}").codec)
    with torch.device("meta"):
        codec = build_codec(config)
    frames = codec.n_codebooks if name != "tiny_oobleck" else codec.latent_channels
    assert codec.sample_rate % 1000 in (0, 100) and frames > 0


@pytest.mark.parametrize(
    ("n_codebooks", "chroma", "onsets", "mel"), [(12, 0.93, 0.8, 0.24), (8, 0.9, 0.8, 0.26), (4, 0.85, 0.75, 0.3)]
)
def test_embedded_codec_quality(n_codebooks, chroma, onsets, mel):
    codec = load_codec("tiny", n_codebooks)
    assert (codec.sample_rate, codec.frame_rate, codec.codebook_size) == (24000, 25.0, 1024)
    assert codec.n_codebooks == n_codebooks <= load_codec().n_codebooks == 12
    assert codec.look_ahead_ms == 200 and not codec.training
    music = [render(compose(1234, index), 24000)[: 6 * 24000] for index in range(3)]
    metrics = codec_quality(codec, torch.from_numpy(np.stack(music)).float()[:, None])
    assert metrics["kbps"] == n_codebooks / 4
    assert metrics["chroma_similarity"] > chroma and metrics["onset_f"] > onsets and metrics["mel_distance"] < mel
