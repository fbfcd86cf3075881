"""Parametric stereo: parameters, quantiser, streaming, and the embedded codec on planted channels."""

import math

import pytest
import torch
from planted import music
from small_codecs import small_codec

from ssmttm.codecs import load_codec
from ssmttm.codecs.metrics import stereo_errors
from ssmttm.codecs.stereo.parametric import (
    ParametricStereoCodec,
    ParametricStereoConfig,
    StereoParameters,
    band_matrix,
)
from ssmttm.errors import UserError

RATE = 24_000
GAINS = {"left": (1, 0), "right": (0, 1), "anti": (1, -1), "equal": (1, 1), "panned": (1, 0.5)}


def part(start: float, seconds: float = 2.0) -> torch.Tensor:
    """A part of a built-in piece, [S]."""
    return torch.from_numpy(music(0)[round(start * RATE) : round((start + seconds) * RATE)])


@pytest.fixture(scope="module")
def embedded() -> ParametricStereoCodec:
    return load_codec("tiny_stereo")


@pytest.fixture
def small() -> ParametricStereoCodec:
    mono = small_codec(decoder_look_ahead=(1, 0)).eval()
    codec = ParametricStereoCodec(ParametricStereoConfig("small", mono.fingerprint, 2, 8), mono, "x").eval()
    torch.manual_seed(1)
    parameters = StereoParameters(torch.rand(1, 500, 8) * math.pi / 2, torch.rand(1, 500, 8) * 2 - 1)
    codec.side.fit(parameters.vectors()[0], rounds=3)
    return codec


def level(wav: torch.Tensor) -> float:
    return float(20 * wav.square().mean().sqrt().clamp_min(1e-9).log10())


@pytest.mark.parametrize("name", GAINS)
def test_embedded_codec_keeps_order_and_levels_of_planted_channels(embedded, name):
    signal = part(10)
    wav = torch.stack([gain * signal for gain in GAINS[name]])[None]
    codes = embedded.encode(wav)
    assert codes.shape == (1, 16, 50)
    decoded = embedded.decode(codes)[0]
    alone = level(embedded.mono.decode(embedded.mono.encode(signal[None, None])))
    assert abs(alone - level(signal)) < 1.0
    for channel, gain in zip(decoded, GAINS[name], strict=True):
        if gain:
            assert abs(level(channel) - alone - 20 * math.log10(abs(gain))) < 0.5
        else:
            assert level(channel) < alone - 30
    if name == "anti":
        assert float((decoded[0] * decoded[1]).sum()) < 0
    if name == "equal":
        assert torch.equal(decoded[0], decoded[1])


def test_embedded_codec_is_the_mono_codec_with_its_codebooks_alone(embedded):
    signal = part(10, 1.0)
    wav = torch.stack([signal, 0.5 * signal])[None]
    codes = embedded.encode(wav)
    assert torch.equal(codes[:, :12], embedded.mono.encode(wav.mean(1, keepdim=True)))
    mono = load_codec("tiny_stereo", 12)
    decoded = mono.decode(mono.encode(wav))
    assert torch.equal(decoded[0, 0], decoded[0, 1])
    assert torch.equal(decoded[:, :1], embedded.mono.decode(codes[:, :12]))
    assert embedded.frame_rate * embedded.n_codebooks <= 1.5 * embedded.mono.frame_rate * embedded.mono.n_codebooks


def test_embedded_codec_is_nearer_to_stereo_than_mono(embedded):
    """Two parts of a piece, one mostly on the left, the other on the right."""
    one, two = part(8), part(20)
    wav = torch.stack([one + 0.2 * two, two + 0.2 * one])[None]
    mid = embedded.mono.decode(embedded.mono.encode(wav.mean(1, keepdim=True)))
    mono, stereo = (
        stereo_errors(mid.expand(-1, 2, -1), wav, RATE),
        stereo_errors(embedded.decode(embedded.encode(wav)), wav, RATE),
    )
    assert stereo.level < 0.7 * mono.level and stereo.width < 0.7 * mono.width
    assert stereo.mel_distance < mono.mel_distance


def test_stereo_errors_are_zero_for_the_original_and_see_exchanged_channels():
    wav = torch.stack([part(10, 1.0), 0.25 * part(10, 1.0)])[None]
    assert max(stereo_errors(wav, wav, RATE)) < 1e-3
    exchanged = stereo_errors(wav.flip(1), wav, RATE)
    assert exchanged.level == pytest.approx(24.1, abs=0.3) and exchanged.total_width < 1e-6
    inverted = stereo_errors(wav * torch.tensor([[1.0], [-1.0]]), wav, RATE)
    assert inverted.phase == pytest.approx(math.pi, abs=0.05) and inverted.level < 1e-3


def test_streamed_decoding_equals_whole_decoding(small):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 32, (2, 5, 120), generator=generator)
    whole = small.decode(codes)
    for size in (7, 40):
        streamed = torch.cat(list(small.decode_stream(codes.split(size, dim=-1))), dim=-1)
        torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)
    history, look_ahead = small.context
    changed = codes.clone()
    changed[..., 20] = (changed[..., 20] + 1) % 32
    moved = (small.decode(changed) - whole).abs().amax((0, 1)).unflatten(0, (-1, small.hop_length)).amax(-1)
    assert moved[: 20 - look_ahead].max() < 1e-6 and moved[20 + history + 1 :].max() < 1e-6


def test_parameters_of_two_channels_and_back():
    angle, relation = torch.tensor([[[0.3, 1.2, 0.0]]]), torch.tensor([[[1.0, -0.5, 0.2]]])
    again = StereoParameters.from_vectors(StereoParameters(angle, relation).vectors())
    torch.testing.assert_close(again.angle, angle)
    torch.testing.assert_close(again.relation[..., :2], relation[..., :2])
    near = StereoParameters.from_vectors(torch.tensor([[[0.01, 0.0, 0.0, math.pi / 2 - 0.01]]]))
    torch.testing.assert_close(near.angle, torch.tensor([[[0.0, math.pi / 2]]]))


def test_measured_parameters_of_panned_noise(small):
    noise = torch.randn(1, 3200, generator=torch.Generator().manual_seed(3))
    found = small.measure(small.stft(noise), small.stft(-0.5 * noise))
    torch.testing.assert_close(found.angle, torch.full_like(found.angle, math.atan(0.5)), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.relation, torch.full_like(found.relation, -1.0), atol=1e-3, rtol=0)
    silent = torch.zeros(1, 3200)
    assert float(small.measure(small.stft(silent), small.stft(silent)).angle.max()) == 0


def test_latents_convert_back_and_save_and_load(small, tmp_path):
    codes = torch.randint(0, 32, (1, 5, 9))
    assert torch.equal(small.from_latents(small.to_latents(codes)), codes)
    small.save(tmp_path / "saved")
    loaded = ParametricStereoCodec.load(tmp_path / "saved", small.mono)
    assert loaded.name == "saved" and loaded.fingerprint != small.fingerprint  # float16
    loaded.save(tmp_path / "again")
    again = ParametricStereoCodec.load(tmp_path / "again", small.mono)
    assert again.fingerprint == loaded.fingerprint != small.mono.fingerprint
    other = small_codec(decoder_look_ahead=(1, 0))
    with torch.no_grad():
        other.widen.bias.add_(1)
    with pytest.raises(UserError, match="saved is for small"):
        ParametricStereoCodec.load(tmp_path / "saved", other)


@pytest.mark.parametrize(("rate", "window", "bands"), [(24_000, 960, 20), (24_000, 320, 8), (48_000, 2048, 20)])
def test_every_bin_is_in_one_band_and_no_band_is_empty(rate, window, bands):
    bank = band_matrix(rate, window, bands)
    assert bank.shape == (window // 2 + 1, bands) and torch.equal(bank.sum(1), torch.ones(len(bank)))
    assert bank.sum(0).min() >= 1
    assert (bank.argmax(1).diff() >= 0).all()
    with pytest.raises(UserError, match="20 bands need as many bins"):
        band_matrix(24_000, 16, 20)
