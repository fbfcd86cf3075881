"""Audio quality filters: planted defects are measured and rejected, music is accepted."""

import numpy as np
import pyloudnorm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.audio.quality import Filters, check_quality, measure
from data_prep.builtin import compose, render
from ssmttm import audio
from ssmttm.audio.loudness import _k_weighting, integrated_loudness

RATE = 44_100


def music(index, seconds=15, rate=RATE):
    return render(compose(9, index), rate)[None, : seconds * rate]


@pytest.fixture(scope="module")
def stereo():
    """Ten seconds of stereo music."""
    left, right = music(0, 10)[0], music(3, 10)[0]
    return np.stack([left + 0.4 * right, left - 0.4 * right]) * np.float32(0.7)


def noise(seconds, rate=RATE, level=0.1, seed=0):
    return (np.random.default_rng(seed).standard_normal((1, round(seconds * rate))) * level).astype(np.float32)


def loudness_by_pyloudnorm(wav, rate):
    meter = pyloudnorm.Meter(rate, block_size=min(0.4, wav.shape[1] / rate))
    return meter.integrated_loudness(wav.T.astype(float))


def resampled(wav, to_rate, back):
    there = audio.resample(torch.from_numpy(wav), back, to_rate)
    return audio.resample(there, to_rate, back).numpy()


def as_mp3(tmp_path, wav, rate, compression):
    import soundfile as sf

    sf.write(tmp_path / "x.mp3", wav.T, rate, compression_level=compression, bitrate_mode="CONSTANT")
    return audio.read(tmp_path / "x.mp3", mono=False)[0].numpy()


@pytest.mark.parametrize("rate", [24_000, RATE])
def test_quality_accepts_music(rate):
    for index in range(12 if rate == 24_000 else 3):
        wav = music(index, 20, rate)
        found = measure(wav, rate)
        assert check_quality(found, Filters()) is None, (index, found)
        assert found.stereo == "mono" and found.silence < 0.4 and found.clipped < 1e-3
        assert found.loudness == pytest.approx(loudness_by_pyloudnorm(wav, rate), abs=0.1)


def test_k_weighting_equals_bs1770_tables():
    shelf, high_pass = _k_weighting(48_000)
    expected = [1.53512485958697, -2.69169619938640, 1.19839281085285, 1, -1.69065929318241, 0.73248077421585]
    assert shelf == pytest.approx(expected, abs=1e-7)
    assert high_pass == pytest.approx([1, -2, 1, 1, -1.99004745483398, 0.99007225036621], abs=1e-7)


@pytest.mark.parametrize("rate", [32_000, RATE, 48_000, 96_000])
def test_loudness_of_bs1770_reference_tone(rate):
    time = np.arange(5 * rate) / rate
    tone = np.sin(2 * np.pi * 997 * time).astype(np.float32)
    assert integrated_loudness(tone, rate) == pytest.approx(-3.01, abs=0.02)
    quiet_half = np.concatenate([tone, tone * np.float32(0.003)])  # 50 dB down: the relative gate leaves it out
    assert integrated_loudness(quiet_half, rate) == pytest.approx(-3.01, abs=0.2)


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.39, 0.41, 3.3])
def test_loudness_of_short_audio(seconds):
    wav = noise(seconds)
    assert integrated_loudness(wav[0], RATE) == pytest.approx(loudness_by_pyloudnorm(wav, RATE), abs=0.3)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_quality_of_partial_silence(fraction):
    wav = noise(10)
    wav[:, : round(fraction * wav.shape[1])] *= 1e-3
    found = measure(wav, RATE)
    assert found.silence == pytest.approx(fraction, abs=0.01)
    rejected = check_quality(found, Filters())
    assert (rejected is not None) == (fraction > 0.5)
    if fraction == 0.6:
        assert (rejected.kind, str(rejected)) == ("silent", "it is silent for 60 % of its length")


def test_quality_of_digital_silence():
    found = measure(np.zeros((2, RATE), np.float32), RATE)
    assert found.silence == 1 and found.loudness == float("-inf") and found.clipped == 0 and found.bandwidth == 0
    assert check_quality(found, Filters()).kind == "silent"


@pytest.mark.parametrize("ceiling", [1.0, 0.5])
def test_quality_of_clipping(stereo, ceiling):
    def clipped(gain):
        return measure(np.clip(stereo * gain, -1, 1) * np.float32(ceiling), RATE)

    assert clipped(0.5).clipped == 0
    heavy = clipped(16)
    fraction = float(np.mean(np.abs(stereo * 16) >= 1))
    assert heavy.clipped == pytest.approx(fraction, rel=0.05) and fraction > 0.1
    assert check_quality(heavy, Filters()).kind == "clipped"
    assert str(check_quality(heavy, Filters())) == f"it is clipped for {100 * heavy.clipped:.1f} % of its samples"
    assert check_quality(clipped(1.5), Filters()) is None


def test_quality_of_isolated_peaks():
    wav = np.tile(np.float32([1, 1, 0]), RATE)[None]
    assert measure(wav, RATE).clipped == 0
    assert measure(np.tile(np.float32([1, 1, 1, 0]), RATE)[None], RATE).clipped == 0.75


def test_quality_of_clipping_after_lossy_codec():
    """A codec turns the flat tops into ripple, and exceeds full scale."""
    time = np.arange(RATE) / RATE
    rippled = np.clip(8 * np.sin(2 * np.pi * 200 * time), -1, 1) * (1.02 + 0.01 * np.sin(2 * np.pi * 7_000 * time))
    assert measure(rippled[None].astype(np.float32), RATE).clipped > 0.8


def test_quality_of_one_clipped_channel(stereo):
    wav = stereo.copy()
    wav[1] = np.clip(wav[1] * 30, -0.3, 0.3)
    assert measure(wav, RATE).clipped == pytest.approx(np.mean(np.abs(stereo[1] * 30) >= 0.3) / 2, rel=0.1)


def test_quality_of_pure_tone():
    time = np.arange(5 * RATE) / RATE
    for hertz in (30, 440, 5_000):
        tone = (0.9 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)[None]
        assert measure(tone, RATE).clipped < 0.01


def test_quality_of_channels(stereo):
    left = stereo[:1]
    kinds = {
        "mono": left,
        "dual-mono": np.concatenate([left, left]),
        "stereo": stereo,
        "out-of-phase": np.concatenate([left, -left]),
        "dead channel": np.concatenate([left, 1e-5 * left]),
    }
    for kind, wav in kinds.items():
        found = measure(wav, RATE)
        assert found.stereo == kind
        assert (check_quality(found, Filters()) is None) == (kind != "out-of-phase")
    inverted = measure(stereo * np.float32([[1], [-1]]), RATE)
    assert inverted.stereo == "out-of-phase"
    assert check_quality(inverted, Filters()).kind == "phase"
    assert check_quality(inverted, Filters(out_of_phase=True)) is None
    assert check_quality(measure(kinds["dual-mono"], RATE), Filters(dual_mono=False)).kind == "dual-mono"


def test_quality_of_stereo_noise():
    wav = np.concatenate([noise(5, seed=1), noise(5, seed=2)])
    assert measure(wav, RATE).stereo == "stereo"


@pytest.mark.parametrize("source_rate", [8_000, 16_000, 22_050])
def test_bandwidth_of_resampled_audio(source_rate):
    found = measure(resampled(noise(5), source_rate, RATE), RATE)
    assert found.bandwidth == pytest.approx(source_rate / 2, rel=0.05)
    assert (check_quality(found, Filters()) is None) == (source_rate > 9_000)
    if source_rate == 8_000:
        assert str(check_quality(found, Filters())) == f"it holds nothing above {found.bandwidth:.0f} Hz"


@pytest.mark.parametrize(("compression", "cut"), [(0.95, 11_000), (0.88, 16_000)])
def test_bandwidth_of_low_rate_mp3(tmp_path, compression, cut):
    bright = music(0) + noise(15, level=0.003)
    assert measure(bright, RATE).bandwidth > 21_000
    assert measure(as_mp3(tmp_path, bright, RATE, compression), RATE).bandwidth == pytest.approx(cut, rel=0.06)


def test_quality_rejects_16_bit_telephone_recordings():
    for index in range(3):
        wav = np.round(resampled(music(index), 8_000, RATE) * 32767) / np.float32(32767)
        assert check_quality(measure(wav, RATE), Filters()).kind == "bandwidth"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 30_000), st.sampled_from([1_000, 8_000, 44_100, 192_000]),
    st.sampled_from([0.0, 1e-7, 0.3, 40.0]), st.integers(0, 99),
)  # fmt: skip
def test_measure_accepts_any_audio(channels, samples, rate, level, seed):
    wav = np.random.default_rng(seed).standard_normal((channels, samples)).astype(np.float32) * np.float32(level)
    found = measure(wav, rate)
    assert 0 <= found.silence <= 1 and 0 <= found.clipped <= 1 and 0 <= found.bandwidth <= rate / 2
    assert found.loudness == float("-inf") or np.isfinite(found.loudness)
    check_quality(found, Filters())
    assert measure(wav[:, ::-1].copy()[:, ::-1], rate) == found
