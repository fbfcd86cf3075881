"""Codecs: the contract of every codec, the spectral codec's modules, losses, discriminator, training and metrics."""

import json

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_prep.builtin import compose
from data_prep.builtin.synth import render
from ssmttm.audio.features import chroma_filterbank, chroma_stft, mel_filterbank, onset_times
from ssmttm.codecs import CodecOutput, TinyCodec, TinyCodecConfig, build_codec, load_codec
from ssmttm.codecs.autoencoder import weights_fingerprint
from ssmttm.codecs.discriminators import MultiResolutionDiscriminator
from ssmttm.codecs.losses import (
    SCALES,
    Scale,
    adversarial_losses,
    discriminator_loss,
    reconstruction_losses,
    spectral_distances,
)
from ssmttm.codecs.metrics import (
    chroma_similarity,
    codebook_statistics,
    codec_quality,
    onset_f_measure,
)
from ssmttm.codecs.quantiser import ResidualQuantiser
from ssmttm.codecs.spectral import STFT
from ssmttm.config import names
from ssmttm.errors import UserError

RATE = 8000
SMALL = TinyCodecConfig(
    sample_rate=RATE, hop_length=320, window=640, n_codebooks=3, codebook_size=32, codebook_dim=4,
    encoder_width=32, encoder_blocks=(1, 1), decoder_width=48, decoder_blocks=(2, 2), decoder_look_ahead=(1, 1),
)  # fmt: skip
SCALES_SMALL = (Scale(1024, 80), Scale(256, 20))
HF_CODECS = {
    "dac": {
        "encoder_hidden_size": 8, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4, 5, 8],
        "sampling_rate": 24000, "n_codebooks": 3, "codebook_size": 64, "codebook_dim": 4, "quantizer_dropout": 0.5,
    },
    "encodec": {
        "num_filters": 4, "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 16, "codebook_size": 32,
        "target_bandwidths": [1.5], "sampling_rate": 24000,
    },
    "mimi": {
        "hidden_size": 32, "num_filters": 4, "codebook_size": 32, "codebook_dim": 16, "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 16, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 4, "upsample_groups": 32, "sliding_window": 20,
    },
    "xcodec": {
        "codebook_size": 32, "target_bandwidths": [0.5],
        "acoustic_model_config": {
            "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 64, "hidden_size": 16,
        },
        "semantic_model_config": {
            "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    },
}  # fmt: skip


def small_codec(**changes):
    torch.manual_seed(0)
    return TinyCodec(TinyCodecConfig(**{**vars(SMALL), **changes}))


def hf_codec(kind):
    torch.manual_seed(0)
    codec = build_codec({"kind": kind, **HF_CODECS[kind]}).eval()
    for name, buffer in codec.named_buffers():  # transformers starts these codebooks at zero
        if name.endswith(("codebook.embed", "codebook.embed_sum")):
            buffer.normal_()
    return codec


def tones(batch, samples, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    notes = [220 * 2 ** (rng.integers(0, 24, 3) / 12) for _ in range(batch)]
    waves = [sum(np.sin(2 * np.pi * f * time) for f in chord) * 0.2 * np.exp(-3 * (time % 0.5)) for chord in notes]
    noise = rng.normal(size=(batch, samples)) * 3e-3
    return torch.tensor(np.stack(waves) + noise, dtype=torch.float32)[:, None]  # [B, 1, S]


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


# Parts


def test_stft_inverse_and_head_reconstruct_the_waveform():
    stft = STFT(640, 160)
    wav = torch.randn(2, 160 * 21)
    spectrum = stft(wav)
    assert spectrum.shape == (2, 21, 321)
    torch.testing.assert_close(stft.inverse(spectrum), wav, atol=1e-5, rtol=0)
    head = small_codec().head
    wav_found = head.synthesise(spectrum.abs().clamp_min(1e-12).log(), spectrum.angle())
    torch.testing.assert_close(wav_found, wav, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_mel_filterbank_equals_librosa(scale):
    theirs = librosa.filters.mel(sr=24000, n_fft=scale.window, n_mels=scale.n_mels)
    np.testing.assert_allclose(mel_filterbank(24000, *scale).numpy(), theirs, atol=1e-7)


def test_chroma_equals_librosa():
    theirs = librosa.filters.chroma(sr=24000, n_fft=2048, tuning=0)
    np.testing.assert_allclose(chroma_filterbank(24000, 2048).numpy(), theirs, atol=1e-6)
    wav = torch.randn(1, 24000, generator=torch.Generator().manual_seed(0))
    theirs = librosa.feature.chroma_stft(y=wav[0].numpy(), sr=24000, tuning=0)
    np.testing.assert_allclose(chroma_stft(wav, 24000)[0].numpy()[:, 3:-3], theirs[:, 3:-3], atol=1e-4)


def test_quantiser_codes_are_nearest_to_residual_by_cosine():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 3, 16, 4, dropout=0.0).eval()
    z = torch.randn(1, 5, 12)
    out, codes, _ = quantiser(z)
    residual = z
    for k in range(3):
        e = quantiser.project_in[k](residual)
        cosine = torch.cosine_similarity(e[:, :, None], quantiser.codebooks[k], dim=-1)
        assert torch.equal(cosine.argmax(-1), codes[:, k])
        residual = residual - quantiser.project_out[k](quantiser.codebooks[k][codes[:, k]])
    torch.testing.assert_close(z - residual, out)
    assert torch.equal(quantiser.encode(z), codes)
    torch.testing.assert_close(quantiser.decode(codes), out)


def test_quantiser_dropout_keeps_the_first_codebooks():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 3, 16, 4, dropout=1.0).train()
    z = torch.randn(200, 5, 12)
    out, codes, _ = quantiser(z)
    partial = [quantiser.decode(codes[:, :n]) for n in (1, 2, 3)]
    kept = torch.stack([(out - part).abs().amax(dim=(1, 2)) < 1e-5 for part in partial])
    assert (kept.sum(dim=0) == 1).all() and (kept.sum(dim=1) > 30).all()


def test_quantiser_unused_entries_are_restarted_and_used_ones_kept():
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(12, 2, 64, 4, dropout=0.0).train()
    z = torch.randn(16, 40, 12)
    quantiser(z)
    with torch.no_grad():
        quantiser.codebooks[:, 8:] = -quantiser.codebooks[:, :1] * 1e-3 + torch.tensor([50.0, 0, 0, 0])  # one direction
    quantiser.usage.zero_()
    quantiser(z)
    used = quantiser.usage > 0
    before = quantiser.codebooks.detach().clone()
    restarted = quantiser.restart_unused(z, min_usage=1e-3)
    assert torch.equal(restarted, ~used) and (restarted.sum(dim=1) > 20).all()
    assert torch.equal(quantiser.codebooks[used], before[used])
    assert (quantiser.usage == 0).all()
    quantiser(z)
    assert ((quantiser.usage > 0).float().mean(dim=1) > 0.9).all()


def test_codec_usage_counts_are_in_state_dict():
    codec = small_codec().train()
    codec(tones(2, 3200))
    state = codec.state_dict()
    assert state["quantiser.usage"].sum() == 2 * 3 * 10 and state["quantiser.seeded"]
    other = small_codec()
    other.load_state_dict(state)
    assert torch.equal(other.quantiser.usage, codec.quantiser.usage)


def test_codec_restart_of_unused_codes_is_seeded_by_torch():
    def restarted():
        codec = small_codec().train()
        wav = tones(2, 3200)
        codec(wav)
        torch.manual_seed(7)
        codec.restart_unused_codes(wav)
        return codec.quantiser.codebooks

    assert torch.equal(restarted(), restarted())


# Training


def test_codec_gradients_reach_every_parameter_in_every_step():
    codec = small_codec(quantiser_dropout=1.0).train()
    wav = tones(4, 3300)
    for _ in range(3):
        codec.zero_grad(set_to_none=True)
        output = codec(wav)
        assert output.audio.shape == wav.shape and output.codes.shape == (4, 3, 11)
        sum(reconstruction_losses(output, wav, RATE, SCALES_SMALL).values()).backward()
        assert [name for name, p in codec.named_parameters() if p.grad is None] == []
    assert all(p.grad.abs().sum() > 0 for p in codec.parameters())


def test_codec_overfits_tones():
    codec = small_codec().train()
    wav = tones(4, 8000)
    optimiser = torch.optim.AdamW(codec.parameters(), 2e-3, betas=(0.8, 0.95))
    mels = []
    for step in range(60):
        terms = reconstruction_losses(codec(wav), wav, RATE, SCALES_SMALL)
        loss = 15 * terms["mel"] + terms["spectrum"] + terms["codebook"] + 0.25 * terms["commitment"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        mels.append(terms["mel"].item())
        if step % 20 == 19:
            codec.restart_unused_codes(wav)
    assert min(mels[-5:]) < 0.6 * mels[0]


def test_codec_losses_are_float32_under_bf16_autocast():
    codec, wav = small_codec().train(), tones(2, 3200)
    with torch.autocast("cpu", torch.bfloat16):
        losses = reconstruction_losses(codec(wav), wav, RATE, SCALES_SMALL)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    codec.zero_grad()
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in codec.parameters())


def build_codec_of(kind):
    return small_codec(codebook_size=256) if kind == "tiny" else hf_codec(kind)


@pytest.mark.parametrize("kind", ["tiny", *HF_CODECS])
def test_codec_computes_the_same_under_autocast(kind):
    codec = build_codec_of(kind).eval()
    wav = torch.randn(2, 1, codec.hop_length * 30) * 0.1
    codes = codec.encode(wav)
    latents = codec.to_latents(codes) + 0.3 * torch.randn(2, codec.latent_channels, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(wav), codes)
        assert torch.equal(codec.from_latents(latents), found := codec.from_latents(latents))
        audio = codec.decode(codes)
    assert torch.equal(codec.from_latents(latents), found) and torch.equal(codec.decode(codes), audio)


@pytest.mark.parametrize("kind", ["tiny", "dac"])
def test_codec_training_quantises_in_float32_under_autocast(kind):
    codec = build_codec_of(kind).train()
    wav = torch.randn(4, 1, codec.hop_length * 60) * 0.1
    quantiser = codec.quantiser if kind == "tiny" else codec.model.quantizer
    inputs = []
    handle = quantiser.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        output = codec(wav)
    handle.remove()
    codes = quantiser.encode(inputs[0]) if kind == "tiny" else quantiser.eval()(inputs[0])[1]
    assert inputs[0].dtype == torch.float32 and torch.equal(codes, output.codes)
    assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
    output.audio.float().sum().backward()


@pytest.mark.parametrize("kind", ["tiny", "dac"])
def test_codec_restart_is_the_same_under_autocast(kind):
    def books(enabled):
        codec = build_codec_of(kind).train()
        wav = torch.randn(2, 1, codec.hop_length * 20, generator=torch.Generator().manual_seed(0)) * 0.1
        codec(wav)
        before = dict(codec.named_parameters())
        before = {name: value.detach().clone() for name, value in before.items()}
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            restarted = codec.restart_unused_codes(wav)
        for name, mask in restarted.items():
            changed = (dict(codec.named_parameters())[name] != before[name]).any(-1)
            assert mask.any() and torch.equal(changed, mask)
        return codec.codebook_vectors()

    assert torch.equal(books(True), books(False))


def test_spectral_losses_are_zero_for_equal_audio_and_skip_long_windows():
    wav = tones(2, 2000)
    equal = reconstruction_losses(CodecOutput(wav, None, {}), wav, RATE)
    assert equal["mel"] == 0 and equal["spectrum"] == 0
    quieter = spectral_distances(wav[:, 0] / 10, wav[:, 0], RATE, SCALES_SMALL)
    assert quieter["spectrum"] == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ValueError, match="shorter"):
        spectral_distances(wav[:, 0, :100], wav[:, 0, :100], RATE)


def test_discriminator_trains_and_gives_generator_gradients():
    torch.manual_seed(0)
    discriminator = MultiResolutionDiscriminator((512, 256), channels=8)
    real, fake = tones(4, 4000), tones(4, 4000, seed=1) + 0.02 * torch.randn(4, 1, 4000)
    optimiser = torch.optim.AdamW(discriminator.parameters(), 2e-3, betas=(0.8, 0.95))
    losses = []
    for _ in range(80):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.2) and losses[-1] < 1
    assert all(p.grad is not None for p in discriminator.parameters())

    output = fake.clone().requires_grad_()
    terms = adversarial_losses(discriminator(real), discriminator(output))
    assert terms["feature"] > 0 and terms["adversarial"] > 0
    sum(terms.values()).backward()
    assert output.grad.abs().sum() > 0
    same = adversarial_losses(discriminator(real), discriminator(real))
    assert same["feature"] == 0 and same["adversarial"] < terms["adversarial"]


# transformers' codecs


@pytest.mark.parametrize("kind", HF_CODECS)
def test_hf_codecs_follow_the_codec_contract(kind):
    codec = hf_codec(kind)
    for samples in (1, 1000, codec.hop_length * 5, codec.hop_length * 5 + 1):
        codes = codec.encode(torch.randn(2, 1, samples) * 0.1)
        frames = -(-samples // codec.hop_length)
        assert codes.shape == (2, codec.n_codebooks, frames) and codes.dtype == torch.int64
        assert codec.decode(codes).shape == (2, 1, frames * codec.hop_length)
    codes = torch.randint(0, codec.codebook_size, (1, codec.n_codebooks, 40))
    latents = codec.to_latents(codes)
    assert latents.shape == (1, codec.latent_channels, 40) and torch.equal(codec.from_latents(latents), codes)
    streamed = torch.cat(list(codec.decode_stream(codes.split(7, dim=-1))), dim=-1)
    torch.testing.assert_close(streamed, codec.decode(codes), atol=1e-5, rtol=1e-5)
    assert (codec.context is None) == (kind != "dac")


@pytest.mark.parametrize("kind", HF_CODECS)
def test_hf_codecs_equal_transformers(kind, tmp_path):
    codec = hf_codec(kind)
    wav = torch.randn(1, 1, codec.hop_length * 6) * 0.1
    codes = codec.encode(wav)
    with torch.no_grad():
        if kind == "encodec":
            theirs = codec.model.encode(wav, bandwidth=1.5)
            their_codes = theirs.audio_codes[0]
            their_wav = codec.model.decode(theirs.audio_codes, theirs.audio_scales).audio_values
        else:
            their_codes = codec.model.encode(wav).audio_codes
            their_wav = codec.model.decode(audio_codes=their_codes).audio_values.view(1, 1, -1)
    assert torch.equal(codes[:, : their_codes.shape[1]], their_codes)
    length = their_wav.shape[-1]
    torch.testing.assert_close(codec.decode(codes)[..., :length], their_wav[..., : codes.shape[-1] * codec.hop_length])

    codec.model.save_pretrained(tmp_path / "saved")
    loaded = load_codec(tmp_path / "saved")
    assert loaded.fingerprint == codec.fingerprint and loaded.name == "saved" and not loaded.training
    assert torch.equal(loaded.encode(wav), codes)


def test_dac_latents_equal_transformers_projected_latents():
    codec = hf_codec("dac")
    codes = torch.randint(0, 64, (1, 3, 8))
    torch.testing.assert_close(codec.to_latents(codes), codec.model.quantizer.from_codes(codes)[1])


def test_dac_trains_like_tiny_codec():
    codec = hf_codec("dac").train()
    wav = torch.randn(2, 1, 3000) * 0.1
    output = codec(wav)
    assert output.audio.shape == wav.shape and output.codes.shape == (2, 3, 10)
    sum(reconstruction_losses(output, wav, 24000, (Scale(512, 40),)).values()).backward()
    assert all(p.grad is not None for p in codec.parameters())
    assert codec.usage.sum() == 2 * 3 * 10
    restarted = list(codec.restart_unused_codes(wav).values())
    assert len(restarted) == 3 and all(mask.any() for mask in restarted) and (codec.usage == 0).all()


def test_hf_codec_rejects_unsupported_configs(tmp_path):
    with pytest.raises(UserError, match="sampling_rate"):
        build_codec({"kind": "dac"})
    with pytest.raises(UserError, match="only mono and stereo"):
        build_codec({"kind": "encodec", **HF_CODECS["encodec"], "audio_channels": 3})
    with pytest.raises(UserError, match="mono"):
        build_codec({"kind": "mimi", **HF_CODECS["mimi"], "audio_channels": 2})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="choose from dac"):
        load_codec(tmp_path)


# Quality


def test_chroma_similarity_separates_notes():
    time = torch.arange(RATE) / RATE
    a, b = (torch.sin(2 * torch.pi * f * time)[None] * 0.3 for f in (440.0, 523.25))
    assert chroma_stft(a, RATE)[0].mean(dim=1).argmax() == 9  # A
    assert chroma_similarity(a * 0.5, a, RATE).item() > 0.999
    assert chroma_similarity(b, a, RATE).item() < 0.5


def test_onset_times_and_f_measure_of_clicks():
    clicks = torch.zeros(1, 2 * RATE)
    for second in (0.4, 0.9, 1.4):
        time = torch.arange(2 * RATE - int(second * RATE)) / RATE
        clicks[0, int(second * RATE) :] += 0.3 * torch.sin(2500 * time) * torch.exp(-20 * time)
    (found,) = onset_times(clicks, RATE)
    assert len(found) == 3 and (found - torch.tensor([0.4, 0.9, 1.4])).abs().max() < 0.06
    assert onset_f_measure(clicks, clicks, RATE).item() == 1
    assert onset_f_measure(torch.roll(clicks, int(0.02 * RATE), -1), clicks, RATE).item() == 1
    assert onset_f_measure(torch.zeros_like(clicks), clicks, RATE).item() == 0


def test_codebook_statistics():
    codes = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)])[None]
    usage, perplexity = codebook_statistics(codes, 16)
    torch.testing.assert_close(usage, torch.tensor([0.5, 1 / 16]))
    torch.testing.assert_close(perplexity, torch.tensor([8.0, 1.0]))


def test_codec_quality_reports_every_metric():
    metrics = codec_quality(small_codec().eval(), tones(2, 2 * RATE))
    assert metrics["kbps"] == pytest.approx(25 * 3 * 5 / 1000)
    assert all(0 <= metrics[name] <= 1 for name in ("chroma_similarity", "onset_f", "codebook_usage"))
    assert metrics["mel_distance"] > 0 and metrics["codebook_perplexity"] >= 1
