"""Music metrics: signals with known tempo, key, level and width, and librosa where it defines the same metric."""

import itertools
import math
from collections import Counter

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.classifiers import TONICS
from ssmttm.evaluation.music import key, signal_stats, tempo
from ssmttm.evaluation.music.music_metrics import measure_clip, measure_files
from ssmttm.evaluation.music.repetition import _longest_diagonal, repetition
from ssmttm.evaluation.music.token_metrics import longest_repeat, measure_tokens

RATE = features.SAMPLE_RATE


def sine(hertz, seconds=2.0, rate=RATE, phase=0.0):
    return torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)).double() / rate + phase).float()[None]


def noise(seconds=2.0, channels=1, seed=0):
    return 0.2 * torch.randn(channels, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def clicks(times, seconds=10.0):
    """A short burst at each time."""
    wav = torch.zeros(round(seconds * RATE))
    burst = torch.randn(600, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 0, 600)
    for time in times:
        start = round(time * RATE)
        if start + 600 < len(wav):
            wav[start : start + 600] += burst
    return wav[None]


def chord(classes, seconds=2.0):
    """Tones of pitch classes, each with its octave, around middle C."""
    tones = [261.63 * 2 ** (c / 12) for c in classes]
    return sum(sine(hertz * h, seconds) / h for hertz in tones for h in (1, 2)) / 20


def curve_of(wav):
    return tempo.envelope(features.onset_strength(features.rms_normalise(wav))[0])


# --- rhythm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bpm", range(70, 171, 10))
def test_tempo_of_click_track(bpm):
    curve = curve_of(clicks(np.arange(0.2, 10, 60 / bpm)))
    found = tempo.tempo(curve)
    assert found == pytest.approx(bpm, rel=0.02)
    times = tempo.beats(curve, found)
    assert np.median(np.diff(times)) == pytest.approx(60 / bpm, rel=0.02) and tempo.beat_variation(times) < 0.03


@pytest.mark.parametrize("bpm", [50, 180, 200])
def test_tempo_of_extreme_click_tracks_up_to_octave(bpm):
    found = tempo.tempo(curve_of(clicks(np.arange(0.2, 10, 60 / bpm))))
    assert min(abs(found * factor / bpm - 1) for factor in (0.5, 1, 2)) < 0.02


def test_beats_of_click_track():
    true = np.arange(0.3, 9.8, 0.5)
    times = tempo.beats(curve_of(clicks(true)), 120.0)
    assert len(times) >= 18 and all(np.abs(true - time).min() < 0.03 for time in times[:-1])


def test_beat_variation_increases_with_jitter():
    rng = np.random.default_rng(0)
    found = []
    for jitter in (0.0, 0.02, 0.05):
        curve = curve_of(clicks(np.arange(0.3, 9.8, 0.5) + rng.uniform(-jitter, jitter, 19)))
        found.append(tempo.beat_variation(tempo.beats(curve, 120.0)))
    assert found[0] < 0.02 < found[1] < found[2]


@pytest.mark.parametrize("a_second", [1, 3, 6])
def test_onset_density_counts_clicks(a_second):
    wav = clicks(np.arange(0.1, 9.95, 1 / a_second))
    assert tempo.onset_density(curve_of(wav)) == pytest.approx(a_second, rel=0.08)
    onsets = librosa.onset.onset_detect(y=wav[0].numpy(), sr=RATE, units="time")
    assert tempo.onset_density(curve_of(wav)) == pytest.approx(len(onsets) / 10, rel=0.12)


def test_tempo_equals_librosa_up_to_octave():
    pattern = [t + offset for t in np.arange(0.2, 9.5, 60 / 104) for offset in (0, 60 / 104 * 0.5, 60 / 104 * 0.75)]
    wav = clicks(pattern)
    theirs = float(np.atleast_1d(librosa.beat.beat_track(y=wav[0].numpy(), sr=RATE)[0])[0])
    ours = tempo.tempo(curve_of(wav))
    assert min(abs(ours * factor / theirs - 1) for factor in (0.5, 1, 2)) < 0.04


@pytest.mark.parametrize("seed", range(10))
def test_beats_equal_plain_loops(seed):
    rng = np.random.default_rng(seed)
    curve, bpm = rng.exponential(size=int(rng.integers(50, 600))) ** 2, rng.uniform(40, 240)
    period, strength = 60 * features.ONSET_RATE / bpm, curve / curve.std()
    score, before = strength.tolist(), [-1] * len(curve)
    for t in range(len(curve)):
        lags = [lag for lag in range(round(period / 2), round(2 * period) + 1) if lag <= t]
        reached = [(score[t - lag] - 100 * math.log(lag / period) ** 2, t - lag) for lag in lags]
        best, place = max(reached, default=(0, -1))
        if best > 0:
            score[t], before[t] = strength[t] + best, place
    frames = [max(range(len(curve) - max(1, round(period)), len(curve)), key=score.__getitem__)]
    while before[frames[-1]] >= 0:
        frames.append(before[frames[-1]])
    assert (tempo.beats(curve, bpm) * features.ONSET_RATE).round().tolist() == frames[::-1]


def test_silence_has_no_tempo_and_no_onsets():
    curve = curve_of(torch.zeros(1, 5 * RATE))
    assert tempo.tempo(curve) == 0 and len(tempo.beats(curve, 0.0)) == 0 and tempo.onset_density(curve) == 0
    assert math.isnan(tempo.beat_variation(np.empty(0)))


# --- tonality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize("mode", ["major", "minor"])
def test_key_of_cadence(tonic, mode):
    third = 4 if mode == "major" else 3
    one, four = [0, third, 7], [5, 5 + third, 12]
    cadence = [one, four, [7, 11, 14], one, one]
    wav = torch.cat([chord([tonic + note for note in notes], 1.0) for notes in cadence], 1)
    found = key.key(features.chroma_log_frequency(wav)[0])
    assert (found.tonic, found.mode) == (TONICS[tonic], mode) and found.clarity > 0.6


@pytest.mark.parametrize("samples", [1_000, 1_001, 1_002, 1_003, 24_000])
def test_decimate_equals_plain_convolution(samples):
    n = np.arange(-32, 33)
    taps = np.sinc(0.95 * n / 4) * np.hanning(65)
    wav = noise(samples / RATE, 2)
    plain = np.stack([np.convolve(row, taps / taps.sum(), "same")[::4] for row in wav.double().numpy()])
    assert features._decimate(wav).numpy() == pytest.approx(plain, abs=1e-6)


def test_chroma_entropy():
    one = key.chroma_entropy(features.chroma_log_frequency(sine(440.0))[0])
    triad = key.chroma_entropy(features.chroma_log_frequency(chord([0, 4, 7]))[0])
    assert one < triad < key.chroma_entropy(features.chroma_log_frequency(noise())[0])
    exact = torch.zeros(12, 3)
    exact[:4] = 0.25
    assert key.chroma_entropy(exact) == pytest.approx(2.0)
    assert key.chroma_entropy(torch.full((12, 5), 1 / 12)) == pytest.approx(math.log2(12))
    silence = features.chroma_log_frequency(torch.zeros(1, RATE))[0]
    assert math.isnan(key.chroma_entropy(silence)) and key.key(silence) is None


# --- levels ---------------------------------------------------------------------------------------------------------


def test_true_peak_between_samples():
    """A sine at a quarter of the rate, 45 degrees off, has samples of 0.707 and a peak of 1 (3.01 dB more)."""
    wav = sine(RATE / 4, phase=math.pi / 4)
    assert 20 * math.log10(float(wav.abs().max())) == pytest.approx(-3.01, abs=0.01)
    assert signal_stats.true_peak(wav[:, 100:-100]) == pytest.approx(0.0, abs=0.5)
    assert signal_stats.true_peak(sine(997.0) * 0.5) == pytest.approx(-6.02, abs=0.05)
    assert signal_stats.true_peak(torch.zeros(1, 1000)) == -math.inf


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_true_peak_of_band_limited_noise_equals_finer_grid(seed):
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(2048))
    spectrum[820:] = 0  # 0.8 of the Nyquist frequency
    wav = torch.from_numpy(np.tile(np.fft.irfft(spectrum), 3)).float()[None]
    fine = np.abs(np.fft.irfft(spectrum, 2048 * 16) * 16).max()
    assert signal_stats.true_peak(wav) == pytest.approx(20 * math.log10(fine), abs=0.35)


def phases():
    """The four interpolation filters, written out: [4, 24]."""
    places = np.arange(24) - 11 - np.arange(4)[:, None] / 4
    filters = np.sinc(places) * np.i0(8 * np.sqrt(1 - np.square(places / 12).clip(max=1))) / np.i0(8)
    return filters / filters.sum(1, keepdims=True)


def true_peak_by_correlation(wav):
    padded = np.pad(wav.numpy(), ((0, 0), (12, 12)))
    return 20 * math.log10(max(np.abs(np.correlate(row, taps)).max() for row in padded for taps in phases()))


@pytest.mark.parametrize("samples", [30, 64, 5_000, 5_001])
def test_true_peak_equals_plain_interpolation(samples):
    wav = noise(samples / RATE, 2, seed=samples) * torch.linspace(0, 1, samples)
    assert signal_stats.true_peak(wav) == pytest.approx(true_peak_by_correlation(wav), abs=1e-4)


@pytest.mark.parametrize("start", range(3_000, 3_016))
def test_true_peak_far_from_highest_sample(start):
    """Half of full scale with the signs that add up between two samples, and a full-scale sample elsewhere."""
    wav = torch.zeros(1, 5_000)
    wav[0, 1_000] = 1
    wav[0, start : start + 24] = torch.from_numpy(0.5 * np.sign(phases()[2]))
    expected = true_peak_by_correlation(wav)
    assert signal_stats.true_peak(wav) == pytest.approx(expected, abs=1e-4) != pytest.approx(0, abs=0.5)


def test_clipping_silence_and_offset():
    wav = sine(100.0)
    clipped = (1.5 * wav).clamp(-1, 1)
    assert signal_stats.clipped_fraction(clipped) == pytest.approx(2 * math.acos(1 / 1.5) / math.pi, abs=0.01)
    assert signal_stats.clipped_fraction(0.9 * wav) == 0
    half = torch.cat([0.5 * wav, torch.zeros_like(wav)], 1)
    assert signal_stats.silent_fraction(half, RATE) == pytest.approx(0.5, abs=0.02)
    assert signal_stats.silent_fraction(torch.cat([half, half.roll(half.shape[1] // 2, 1)]), RATE) == 0
    assert signal_stats.dc_offset(0.5 * wav + 0.1) == pytest.approx(0.1, abs=1e-3)


def test_stereo():
    mono = noise()
    assert signal_stats.stereo(mono) is None
    assert signal_stats.stereo(mono.repeat(2, 1)) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert signal_stats.stereo(torch.cat([mono, -mono])) == pytest.approx((1.0, -1.0), abs=1e-6)
    assert signal_stats.stereo(noise(channels=2)) == pytest.approx((0.5, 0.0), abs=0.02)
    assert signal_stats.stereo(torch.cat([mono, torch.zeros_like(mono)]))[1] == 0.0


def test_brightness():
    centroid, rolloff, bandwidth = signal_stats.brightness(signal_stats.spectrum(sine(1000.0)), RATE)
    assert rolloff == pytest.approx(1000, abs=15) and bandwidth < 1100 and centroid == pytest.approx(1000, rel=0.05)
    wav = noise(10.0)
    dull = audio.resample(audio.resample(wav, RATE, 8000), 8000, RATE)
    assert signal_stats.brightness(signal_stats.spectrum(wav), RATE)[2] > 11_900
    assert signal_stats.brightness(signal_stats.spectrum(dull), RATE)[2] == pytest.approx(4000, rel=0.05)
    theirs = librosa.feature.spectral_centroid(y=wav[0].numpy(), sr=RATE, n_fft=4096).mean()
    assert signal_stats.brightness(signal_stats.spectrum(wav), RATE)[0] == pytest.approx(theirs, rel=0.02)
    assert signal_stats.brightness(signal_stats.spectrum(torch.zeros(1, 9000)), RATE) == (0, 0, 0)


def test_measure_clip_loudness_of_bs1770_sine():
    """A full-scale sine of 997 Hz in one channel is -3.01 LUFS (BS.1770-4)."""
    assert measure_clip(sine(997.0, 5.0, 48_000), 48_000).loudness == pytest.approx(-3.01, abs=0.05)


# --- repetition, codes ----------------------------------------------------------------------------------------------


def melody(seconds, seed):
    rng = np.random.default_rng(seed)
    return torch.cat([chord([int(rng.integers(0, 24))], 0.25) for _ in range(round(4 * seconds))], 1)


def test_repetition_of_loop():
    part = melody(4.0, 1)
    loop = repetition(features.log_mel(features.rms_normalise(torch.cat([part, part], 1)))[0])
    assert loop.fraction > 0.35 and loop.longest == pytest.approx(4.0, abs=0.4)
    through = repetition(features.log_mel(features.rms_normalise(melody(8.0, 2)))[0])
    assert through.fraction < 0.15 and through.longest < loop.longest / 2
    assert repetition(features.log_mel(torch.zeros(1, 5 * RATE))[0]) == (0, 0)


@pytest.mark.parametrize(("size", "fraction"), [(1, 1.0), (3, 0.0), (12, 0.5), (40, 0.9)])
def test_longest_diagonal_equals_plain_loops(size, fraction):
    flags = np.random.default_rng(size).random((size, size)) < fraction
    diagonals = ("".join("x" if flag else " " for flag in flags.diagonal(d)) for d in range(-size, size + 1))
    assert _longest_diagonal(flags) == max(len(run) for text in diagonals for run in text.split(" "))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_longest_repeat_equals_plain_loops(values):
    codes = np.array([values, [v % 2 for v in values]])
    n = len(values)
    columns = [tuple(column) for column in codes.T]
    longest = max(
        (size for size in range(1, n) for i in range(n - size) for j in range(i + 1, n - size + 1)
         if columns[i : i + size] == columns[j : j + size]), default=0,
    )  # fmt: skip
    assert longest_repeat(codes) == longest


@given(st.lists(st.integers(0, 7), min_size=3, max_size=60))
@settings(max_examples=40, deadline=None)
def test_token_entropies_equal_counts(values):
    def entropy(items):
        shares = [count / len(items) for count in Counter(items).values()]
        return -sum(share * math.log2(share) for share in shares)

    found = measure_tokens(np.array([values]), 8)
    assert found.entropy[0] == pytest.approx(entropy(values), abs=1e-9)
    both = entropy(list(itertools.pairwise(values))) - entropy(values[:-1])
    assert found.conditional[0] == pytest.approx(both, abs=1e-9)
    assert found.usage[0] == len(set(values)) / 8


# --- clips and folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        audio.write(tmp_path / f"{i}.wav", 0.3 * melody(3.0, i), RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF not music")
    audio.write(tmp_path / "short.wav", sine(440.0, 0.1), RATE)
    return tmp_path


def test_measure_files_lists_unreadable_files(folder):
    found = measure_files(sorted(folder.glob("*.wav")))
    assert len(found.clips) == 3
    assert {path.rsplit("/", 1)[1] for path in found.unreadable} == {"broken.wav", "short.wav"}
    assert sum("skipped" in note for note in found.notes()) == 2
    summary = found.summary()
    assert summary["loudness"]["n"] == 3 and summary["loudness"]["low"] <= summary["loudness"]["mean"]
    assert "stereo_width" not in summary and found.document()["clips"]


def test_measure_files_lists_files_without_music(folder):
    audio.write(folder / "silent.wav", torch.zeros(1, 3 * RATE), RATE)
    audio.write(folder / "phase.wav", 0.3 * torch.cat([melody(3.0, 5), -melody(3.0, 5)]), RATE)
    found = measure_files(sorted(folder.glob("*.wav")))
    assert len(found.clips) == 3 and "silent" in found.unreadable[str(folder / "silent.wav")]
    assert "cancel" in found.unreadable[str(folder / "phase.wav")]


def test_measure_files_notes_mixed_rates_and_channels(folder):
    audio.write(folder / "other.wav", 0.3 * noise(3.0, 2), 44_100)
    found = measure_files(sorted(folder.glob("*.wav")))
    notes = " ".join(found.notes())
    assert "24000, 44100" in notes and "stereo" in notes and "stereo_width" not in found.summary()


def test_measure_files_and_clip_reject_bad_input(tmp_path):
    with pytest.raises(UserError, match="none of 0"):
        measure_files([])
    (tmp_path / "x.wav").write_bytes(b"no")
    with pytest.raises(UserError, match="none of 1"):
        measure_files([tmp_path / "x.wav"])
    with pytest.raises(UserError, match="NaN"):
        measure_clip(torch.full((1, RATE), math.nan), RATE)
    with pytest.raises(UserError, match=r"0\.5 s"):
        measure_clip(torch.zeros(1, 100), RATE)


def test_measure_clip_of_silence_and_noise():
    silent = measure_clip(torch.zeros(2, 3 * RATE), RATE)
    assert silent.silent == 1 and silent.loudness == -math.inf and silent.tonic is None
    assert math.isnan(silent.tempo)  # excluded from the mean
    assert measure_clip(noise(3.0), RATE).bandwidth > 11_000
