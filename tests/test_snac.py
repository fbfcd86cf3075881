"""SNAC: levels of unequal rates as codebooks of one rate, for any length; equal to the package's own."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm.codecs import load_codec
from ssmttm.codecs.snac import codebooks_of_levels, codes_to_levels, levels_to_codes
from ssmttm.errors import UserError
from ssmttm.patterns import PATTERNS, get_pattern

STRIDES = st.sampled_from([(4, 2, 1), (8, 4, 2, 1), (1,), (6, 3, 1), (4, 4, 1), (2, 1)])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(strides=STRIDES, batch=st.integers(1, 3), frames=st.integers(1, 20), name=st.sampled_from(PATTERNS))
def test_levels_become_codebooks_of_one_rate_and_back(strides, batch, frames, name):
    """For any length and through every pattern; a frame holds what sounds in it, each level in the order of time."""
    counts = codebooks_of_levels(strides)
    finest = frames * strides[0]
    levels = [torch.arange(finest // stride).repeat(batch, 1) * stride for stride in strides]  # first fine frame
    codes = levels_to_codes(levels, counts)
    assert codes.shape == (batch, sum(counts), frames)
    assert torch.equal(codes // strides[0], torch.arange(frames).expand_as(codes))
    for first, n in zip([sum(counts[:i]) for i in range(len(counts))], counts, strict=True):
        assert (codes[:, first : first + n].diff(dim=1) > 0).all()
    pattern = get_pattern(name, n_codebooks=sum(counts))
    back = codes_to_levels(pattern.revert(pattern.build(codes, -1)), counts)
    assert all(torch.equal(level, found) for level, found in zip(levels, back, strict=True))
    first = codes_to_levels(codes[:, : counts[0]], counts)
    assert len(first) == 1 and torch.equal(first[0], levels[0])


def test_levels_that_cannot_share_a_frame_are_refused():
    for strides in ((4, 3, 1), (1, 2), (4, 1, 2)):
        with pytest.raises(UserError, match="cannot share a frame"):
            codebooks_of_levels(strides)


def test_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "snac", None)
    with pytest.raises(UserError, match="needs the package snac: pip install snac"):
        load_codec(f"snac:{tmp_path}")


CONFIG = {
    "sampling_rate": 8_000, "encoder_dim": 8, "encoder_rates": [2, 4], "decoder_dim": 64, "decoder_rates": [4, 2],
    "attn_window_size": 16, "codebook_size": 64, "codebook_dim": 4, "vq_strides": [4, 2, 1], "latent_dim": 32,
}  # fmt: skip


@pytest.fixture(params=[16, None])
def small(request, tmp_path):
    """A small random SNAC of the package, with attention or without, and its folder."""
    package = pytest.importorskip("snac", reason="the package snac is not installed")
    config = CONFIG | {"attn_window_size": request.param}
    config |= {"encoder_dim": 16, "latent_dim": None} if request.param else {}
    torch.manual_seed(0)
    model = package.SNAC(**config).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return model, tmp_path


def test_snac_equals_the_package(small):
    model, folder = small
    codec = load_codec(f"snac:{folder}")
    assert (codec.n_codebooks, codec.codebook_size, codec.sample_rate, codec.hop_length) == (7, 64, 8_000, 32)
    wav = 0.3 * torch.randn(2, 1, 3_000, generator=torch.Generator().manual_seed(0))
    codes, theirs = codec.encode(wav), model.encode(wav)
    assert codes.shape == (2, 7, 94)  # ceil(3000 / 32)
    whole = levels_to_codes(theirs, codec.counts)  # padded to the window of the attention
    assert torch.equal(codes, whole[..., :94])
    for item in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            expected = model.decode([level[item : item + 1] for level in theirs])
        found = codec.decode(whole)[item : item + 1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_snac_gives_equal_audio_for_equal_codes_of_any_length(small):
    """Alone or in a batch, and without touching the generator of random numbers; the package draws noise."""
    _, folder = small
    codec = load_codec(f"snac:{folder}")
    for frames in (1, 5, 8):
        codes = torch.randint(64, (3, 7, frames), generator=torch.Generator().manual_seed(frames))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        wav = codec.decode(codes)
        assert torch.equal(torch.get_rng_state(), before) and wav.shape == (3, 1, 32 * frames)
        torch.testing.assert_close(codec.decode(codes[1:2]), wav[1:2], rtol=1e-5, atol=1e-6)
        assert torch.equal(codec.from_latents(codec.to_latents(codes)), codes)
    coarse = load_codec(f"snac:{folder}", n_codebooks=3)
    assert coarse.decode(codes[:, :3]).shape == wav.shape
    with pytest.raises(UserError, match="must be one of 1, 3, 7"):
        load_codec(f"snac:{folder}", n_codebooks=4)
    (folder / "pytorch_model.bin").write_text("nonsense")
    with pytest.raises(UserError, match="holds no SNAC"):
        load_codec(f"snac:{folder}")
