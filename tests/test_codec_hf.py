"""Codecs of transformers' classes: the contract, equality with transformers, training."""

import json

import pytest
import torch
from small_codecs import HF_CODECS, hf_codec

from ssmttm.codecs import build_codec, load_codec
from ssmttm.codecs.losses import (
    Scale,
    reconstruction_losses,
)
from ssmttm.errors import UserError


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
