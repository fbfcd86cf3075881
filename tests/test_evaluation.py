"""Attribute classifiers and prompt adherence: features of known audio, equivariance, label statistics, the report."""

import json
import math
from collections import namedtuple
from dataclasses import asdict

import numpy as np
import pytest
import torch
from small_music import clips
from small_vaes import small_vae

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.cli import demo, train_attribute_classifiers
from ssmttm.codecs import load_codec
from ssmttm.codecs.vae import PatchedVAE
from ssmttm.data.writer import StoreWriter
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes import adherence
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, expected_labels, reconstruct_with_codec
from ssmttm.evaluation.attributes.classifiers import MODES, AttributeClassifiers, pitch_class, tempo_class, windows
from ssmttm.evaluation.metrics.statistics import label_accuracy
from ssmttm.evaluation.music.audio_checks import (
    MIN_PERSISTENCE,
    NOISE_FLATNESS,
    check_audio,
    pairwise_difference,
    spectral_flatness,
    spectral_persistence,
)
from ssmttm.evaluation.protocol.balanced_prompts import balanced_prompts, mentioned_attributes

RATE = features.SAMPLE_RATE
FAMILIES = ["brass", "flutes", "guitar", "mallets", "organ", "piano", "reeds", "strings", "synth"]


def clicks(bpm, seconds=10.0):
    """Decaying noise bursts on every beat. [1, S]."""
    wav = torch.zeros(1, int(seconds * RATE))
    burst = torch.randn(1200, generator=torch.Generator().manual_seed(1)) * torch.exp(-torch.arange(1200) / 200)
    for beat in range(int(seconds * bpm / 60)):
        start = int(beat * 60 / bpm * RATE)
        part = wav[0, start : start + 1200]
        part += burst[: len(part)]
    return wav


def tone(note, seconds=0.5, partials=4):
    """A harmonic tone of a MIDI note. [1, S]."""
    time = torch.arange(int(seconds * RATE)) / RATE
    hertz = 440 * 2 ** ((note - 69) / 12)
    return sum(torch.sin(2 * math.pi * hertz * h * time) / h**2 for h in range(1, partials + 1))[None] * 0.3


@pytest.mark.parametrize("bpm", [60, 90, 120, 160])
def test_tempogram_of_click_track_peaks_at_its_tempo(bpm):
    gram = features.tempogram(features.onset_strength(features.rms_normalise(clicks(bpm))))
    grid = features.tempi()
    bands = len(features.ONSET_BANDS)
    fourier = gram[0, bands:].mean(0).masked_fill(grid > 1.5 * bpm, 0)
    assert float(grid[fourier.argmax()]) == pytest.approx(bpm, rel=0.03)
    beat = (grid - bpm).abs().argmin()
    assert gram[0, :bands, beat].mean() > 0.6, "the autocorrelation at the beat"
    between = (grid - bpm * 4 / 3).abs().argmin()
    assert gram[0, :bands, between].mean() < 0.2


def test_chroma_of_c_major_scale_has_its_seven_notes():
    scale = [60, 62, 64, 65, 67, 69, 71]
    chroma = features.chroma_log_frequency(torch.cat([tone(note) for note in scale * 2], 1)).mean(-1)[0]
    inside = chroma[[note % 12 for note in scale]]
    outside = chroma[[1, 3, 6, 8, 10]]
    assert inside.min() > 1.5 * outside.max()
    assert features.chroma_log_frequency(tone(69, 2.0)).mean(-1)[0].argmax() == 9


def test_pitch_class_bands_shift_with_transposition():
    low, high = (features.log_frequency_spectrum(features.rms_normalise(tone(note, 2.0))) for note in (60, 61))
    low, high = features.pitch_class_bands(low).mean(-1), features.pitch_class_bands(high).mean(-1)
    torch.testing.assert_close(low.roll(features.BINS_PER_SEMITONE, 2)[:, 1], high[:, 1], atol=0.1, rtol=0)


def test_key_network_is_equivariant_to_transposition():
    torch.manual_seed(0)
    network = AttributeClassifiers(FAMILIES).eval().key
    bands = torch.rand(2, len(features.PITCH_BANDS), features.PITCH_BINS, 40)
    for semitones in range(1, 12):
        shifted = network(bands.roll(semitones * features.BINS_PER_SEMITONE, 2))
        torch.testing.assert_close(shifted, network(bands).roll(semitones, 1), atol=1e-5, rtol=1e-5)


def test_predict_is_independent_of_level_and_batch():
    torch.manual_seed(0)
    classifiers = AttributeClassifiers(FAMILIES).eval()
    wav = torch.cat([clicks(100), torch.cat([tone(n, 2.5) for n in (60, 64, 67, 72)], 1)])
    together = classifiers.predict(wav, RATE)
    assert classifiers.predict(wav[1] * 0.1, RATE)[0].mode_probs == pytest.approx(together[1].mode_probs, abs=1e-4)
    for found in together:
        for table in (found.family_probs, found.tempo_probs, found.mode_probs):
            assert sum(table.values()) == pytest.approx(1, abs=1e-4)
        assert found.tempo_class in ("slow", "medium", "fast")
        assert found.third in ("major", "minor")
    assert len(classifiers.predict(torch.zeros(1, 8 * RATE), RATE)) == 1, "silence gives no NaN"
    with pytest.raises(UserError, match="too short"):
        classifiers.predict(torch.zeros(RATE), RATE)


def test_classifier_windows_cover_both_ends():
    wav = torch.arange(25 * RATE)[None].float()
    parts = windows(wav)
    assert len(parts) == 3 and all(part.shape[-1] == 10 * RATE for part in parts)
    assert parts[0][0, 0] == 0 and parts[-1][0, -1] == wav[0, -1]


def test_classifiers_save_load_and_reject_damage(tmp_path):
    torch.manual_seed(0)
    classifiers = AttributeClassifiers(FAMILIES, {"seed": 3}).eval()
    classifiers.save(tmp_path)
    loaded = AttributeClassifiers.from_pretrained(tmp_path)
    assert loaded.fingerprint == classifiers.fingerprint and loaded.card["seed"] == 3 and loaded.families == FAMILIES
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        AttributeClassifiers.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no classifiers"):
        AttributeClassifiers.from_pretrained(tmp_path / "nowhere")


def test_label_accuracy_interval_and_p_value_against_closed_forms():
    for k, n in ((0, 10), (7, 10), (61, 100), (100, 100)):
        for n_classes in (9, 3, 2):
            labels = [f"class {i % n_classes}" for i in range(n)]
            predicted = [label if i < k else "none" for i, label in enumerate(labels)]
            found = label_accuracy(labels, predicted, n_classes)
            z = 1.959964
            centre, spread = (k / n + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
            half = spread * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
            assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
            chance = max(found.uniform, found.majority)
            tail = math.fsum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(k, n + 1))
            assert found.p_value == pytest.approx(tail, abs=1e-9)


def test_label_accuracy_of_guess_and_of_truth():
    rng = np.random.default_rng(0)
    expected = [FAMILIES[i % 9] for i in range(180)]
    guess = label_accuracy(expected, list(rng.choice(FAMILIES, 180)), 9)
    assert guess.uniform == pytest.approx(1 / 9) and guess.majority == pytest.approx(1 / 9)
    assert guess.shuffled == pytest.approx(1 / 9, abs=0.01) and guess.p_value > 0.05 and guess.shuffled_p > 0.05
    sure = label_accuracy(expected, expected, 9)
    assert sure.accuracy == 1 and sure.p_value < 1e-50 and sure.shuffled_p < 1e-3
    assert sure.shuffled == pytest.approx(1 / 9, abs=0.01), "shuffling removes even perfect accuracy"
    biased = label_accuracy(expected, ["piano"] * 180, 9)
    assert biased.accuracy == pytest.approx(biased.shuffled) and biased.shuffled_p == 1


def test_mentioned_attributes_of_captions():
    expected = {"family": "guitar", "tempo_class": "slow", "mode": "dorian"}
    caption = "A slow waltz in D dorian on a banjo, backed by bass guitar"
    assert mentioned_attributes(caption, expected) == set(expected)
    caption = "A waltz at 72 bpm in dorian mode over bass guitar"
    assert mentioned_attributes(caption, expected) == {"tempo_class", "mode"}
    assert mentioned_attributes("A slow waltz at 140 bpm in D minor on a guitar", expected) == {"family"}
    assert mentioned_attributes("A synth-pop track", expected | {"family": "synth"}) == set()
    assert mentioned_attributes("Synths, over synth bass", expected | {"family": "synth"}) == {"family"}


def test_train_attribute_classifiers_writes_classifiers_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = tmp_path / "store"
    writer = StoreWriter(store, {"made": "for the test"}, sample_rate=RATE)
    for i in range(6):
        bpm, mode = (70, 110, 150)[i % 3], MODES[i % 4]
        audio.write(store / f"audio/{i}.wav", clicks(bpm, 20.0) + tone(60 + i, 20.0) * 0.1, RATE)
        truth = {"lead": {"family": FAMILIES[i % 3]}, "bpm": bpm, "key": "D", "mode": mode}
        row = {"id": f"s{i}", "split": "train" if i < 4 else ("valid", "test")[i - 4], "licence": "CC0-1.0"}
        writer.add({**row, "duration": 20.0, "audio": f"audio/{i}.wav", "truth": json.dumps(truth)})
    writer.finish()
    arguments = ["--store", str(store), "--codec", "tiny", "--reconstructed", "1", "--steps", "2", "--batch", "3"]
    train_attribute_classifiers.main([*arguments, "--out", str(tmp_path / "out")])
    first = AttributeClassifiers.from_pretrained(tmp_path / "out")
    assert first.families == FAMILIES[:3] and first.card["trained_on"]["clips"] == 4
    assert first.card["held_out"]["true"]["n"] == first.card["held_out"]["reconstructed"]["n"] == 2
    assert len(list((tmp_path / "ssmttm-attribute-features").iterdir())) == 2, "features are cached"
    recipe = "python -m ssmttm.cli.train_attribute_classifiers --store STORE --codec tiny --reconstructed 1 --steps 2"
    assert first.card["recipe"] == f"{recipe} --batch 3" and first.card["licence"] == "CC0-1.0"
    further = [*arguments, "--init", str(tmp_path / "out"), "--networks", "tempo", "--clips", "2", "--held-out", "1"]
    train_attribute_classifiers.main([*further, "--out", str(tmp_path / "further")])
    second = AttributeClassifiers.from_pretrained(tmp_path / "further")
    same = {name: torch.equal(value, first.state_dict()[name]) for name, value in second.state_dict().items()}
    assert all(equal for name, equal in same.items() if not name.startswith("tempo."))
    assert not all(equal for name, equal in same.items() if name.startswith("tempo."))
    assert second.card["held_out"]["true"]["n"] == 1 and second.card["trained_on"]["clips"] == 2
    train_attribute_classifiers.main([*arguments, "--out", str(tmp_path / "second")])
    assert AttributeClassifiers.from_pretrained(tmp_path / "second").fingerprint == first.fingerprint


def test_shipped_classifiers_are_accurate():
    held_out = AttributeClassifiers.from_pretrained().card["held_out"]["true"]
    assert held_out["n"] >= 100 and min(held_out[name] for name in ATTRIBUTES) >= 0.9


class FakeStore:
    """Six segments with synthetic annotations for each pair of family and mode, without files."""

    path, fingerprint = "fake", "0" * 16

    def __init__(self):
        self.rows = [
            {"lead": {"family": family}, "bpm": (70, 110, 150)[i % 3], "key": "D", "mode": mode}
            for i in range(6)
            for family in FAMILIES
            for mode in MODES
        ]

    def indices(self, split):
        return np.arange(len(self.rows))

    def ids(self, rows):
        return [f"segment-{row}" for row in rows]

    def annotations(self, row):
        return self.rows[row]

    def captions(self, row):
        annotations, words = self.rows[row], {"mallets": "marimba", "reeds": "oboe"}
        lead = words.get(annotations["lead"]["family"], annotations["lead"]["family"])
        return ["Music.", f"{annotations['bpm']} bpm, D {annotations['mode']}, {lead}"]


def test_balanced_prompts_are_balanced_distinct_and_seeded():
    store = FakeStore()
    prompts = balanced_prompts(store, 36, seed=1)
    assert len({p.row for p in prompts}) == 36
    for name, size in (("family", 9), ("tempo_class", 3), ("mode", 4)):
        counts = np.unique([p.expected[name] for p in prompts], return_counts=True)[1]
        assert len(counts) == size and counts.max() - counts.min() <= 3
    assert prompts == balanced_prompts(store, 36, seed=1) != balanced_prompts(store, 36, seed=2)
    assert all(p.expected == expected_labels(store.annotations(p.row)) for p in prompts)
    with pytest.raises(UserError, match="fewer than 999"):
        balanced_prompts(store, 999, seed=1)


def test_adherence_of_unconditional_model_is_chance(monkeypatch, tmp_path):
    torch.manual_seed(0)
    classifier = {"n": 3, "family": 0.9, "tempo_class": 0.9, "mode": 0.9, "third": 0.95, "confusion": {}}
    monkeypatch.setattr(adherence, "accuracy", lambda *rest: {"true": classifier, "reconstructed": classifier})
    monkeypatch.setattr(adherence, "music_flatness", lambda *rest: 0.01)
    paths = []
    for seed in range(24):
        noise = 0.1 * torch.randn(1, 4 * RATE, generator=torch.Generator().manual_seed(seed))
        paths.append(audio.write(tmp_path / f"{seed}.wav", noise, RATE))
    codec = namedtuple("NoCodec", "kind fingerprint")("codec", "none")
    report = adherence.measure_adherence(
        FakeStore(), balanced_prompts(FakeStore(), 24, 0), paths, codec, {"weights": "f" * 16, "seed": 0}
    )
    assert report.checks == {"good": 0, "silent": 0, "clipped": 0, "noisy": 24}
    for found in report.accuracy.values():
        assert found.shuffled_p > 0.001 and abs(found.accuracy - found.shuffled) < 0.35
    saved = json.loads(json.dumps(asdict(report)))
    assert saved["fingerprint"]["weights"] == "f" * 16 and len(saved["clips"]) == 24
    assert saved["fingerprint"]["seed"] == 0 and saved["fingerprint"]["classifiers"]
    rows = report.section().rows
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1 and "90.0 %" in rows[1]


@pytest.mark.parametrize("decoder", ["tiny", "tiny_stereo", "vae", "stereo vae"])
def test_mono_music_is_reconstructed_by_any_codec_or_vae(decoder):
    wav = tone(60, 1.0)
    if "vae" in decoder:
        codec = PatchedVAE(small_vae(sample_rate=RATE, channels=2 if "stereo" in decoder else 1), 3)
    else:
        codec = load_codec(decoder)
    decoded = codec.decode(codec.encode(wav.expand(codec.channels, -1)[None]))[0, :, : wav.shape[-1]]
    torch.testing.assert_close(reconstruct_with_codec(codec, wav, RATE), decoded.mean(0, keepdim=True))


def test_check_audio_detects_silence_clipping_and_noise():
    noise = torch.randn(4 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    music = torch.cat([tone(note) for note in (60, 64, 67, 72)], 1)[0]
    reference = spectral_flatness(music, RATE)
    assert spectral_flatness(noise, RATE) == pytest.approx(NOISE_FLATNESS, abs=0.03)
    assert reference < 0.05 and spectral_flatness(torch.zeros(RATE), RATE) == 0
    assert check_audio(music, RATE, reference).good
    assert check_audio(noise, RATE, reference).noisy
    assert check_audio(torch.zeros(RATE), RATE, reference).silent
    assert check_audio((music * 20).clamp(-1, 1), RATE, reference).clipped
    assert not check_audio(music.clone().index_fill_(0, torch.tensor([5]), float("nan")), RATE, reference).finite
    matrix = pairwise_difference([music, music * 0.5, noise], RATE)
    assert matrix[0, 1] < 0.1 and matrix[0, 2] > 6 and torch.equal(matrix, matrix.T)


def decoded(codec, codes):
    """Audio [S] of codes [K, T]."""
    with torch.inference_mode():
        return codec.decode(codes[None])[0, 0].clone()


@pytest.fixture(scope="module")
def calibration():
    """Built-in music, the same decoded, and what a model plays that has learnt nothing, or how often codes occur."""
    codec, (wavs, _) = load_codec("tiny"), clips(0, 8)
    with torch.inference_mode():
        codes = torch.cat([codec.encode(wav[None])[0] for wav in wavs], -1)  # [K, T]
    generator = torch.Generator().manual_seed(0)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    k, t, n = len(codes), codes.shape[-1], 400
    sets = {"music": [wav[0] for wav in wavs], "decoded": list(decoded(codec, codes).chunk(len(wavs)))}
    sets["random codes"] = [decoded(codec, draw(codec.codebook_size, k, n)) for _ in range(4)]
    sets["codes by frequency"] = [decoded(codec, codes.gather(1, draw(t, k, n))) for _ in range(4)]
    sets["frames by frequency"] = [decoded(codec, codes[:, draw(t, n)]) for _ in range(4)]
    random = draw(codec.codebook_size, k, 4 * n)
    replaced = torch.where(draw(2, k, 4 * n) == 1, codes[:, : 4 * n], random).split(n, 1)
    sets["half of the codes random"] = [decoded(codec, row) for row in replaced]
    white = torch.randn(4, 10 * RATE, generator=generator)
    spectrum = torch.fft.rfft(white) / torch.arange(5 * RATE + 1).clamp_min(200) ** 0.5
    sets["white noise"], sets["pink noise"] = list(0.1 * white), list(5 * torch.fft.irfft(spectrum))
    return sets


def test_persistence_separates_music_from_noise_and_untrained_models(calibration):
    found = {name: [spectral_persistence(wav, RATE) for wav in wavs] for name, wavs in calibration.items()}
    for name in ("music", "decoded"):
        assert np.mean(np.array(found.pop(name)) > MIN_PERSISTENCE) >= 0.9, name
    for name, values in found.items():
        assert max(values) < MIN_PERSISTENCE - 0.1, name


def test_check_audio_fails_noise_like_audio(calibration):
    """Decoded random codes have the flatness of music."""
    flatness = float(np.quantile([spectral_flatness(wav, RATE) for wav in calibration["music"]], 0.95))
    checks = {name: [check_audio(wav, RATE, flatness) for wav in wavs] for name, wavs in calibration.items()}
    for name in ("music", "decoded"):
        assert np.mean([check.noisy for check in checks.pop(name)]) <= 0.1
    assert all(check.noisy and not check.good for found in checks.values() for check in found)
    assert "noise-like" in checks["random codes"][0].summary()


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_persistence_does_not_depend_on_rate_and_level(calibration, rate):
    for wav in (calibration["music"][0], calibration["random codes"][0]):
        expected = spectral_persistence(wav, RATE)
        assert spectral_persistence(0.1 * wav, RATE) == pytest.approx(expected, abs=0.02)
        assert spectral_persistence(audio.resample(wav[None], RATE, rate), rate) == pytest.approx(expected, abs=0.05)
    assert spectral_persistence(torch.zeros(RATE), RATE) == 0
    assert math.isfinite(spectral_persistence(0.1 * torch.ones(9), RATE))


def test_demo_page_names_its_checks_and_marks_noise(calibration, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "open_store", lambda path: FakeStore())
    monkeypatch.setattr(demo, "music_flatness", lambda *rest: 0.01)
    monkeypatch.setattr(demo, "PROMPTS", ("a slow waltz", "a fast jig"))
    steps = [{"step": i, "loss": 6.9, "seconds": 9.0, "audio_seconds_per_second": 20.0} for i in (1, 300)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    audios = {"noise": calibration["random codes"], "music": calibration["music"]}
    audios = {name: torch.stack([wav[None, : 4 * RATE] for wav in wavs[:2]]) for name, wavs in audios.items()}
    page = demo.write_demo_page(tmp_path / "index.html", audios, RATE, tmp_path, tmp_path).read_text()
    assert "sounds like music" not in page and page.count("not silent") == page.count("not clipped") == 4
    assert page.count('<dt>not noise</dt><dd class="bad">no</dd>') == 2
    assert page.count('<dt>not noise</dt><dd class="good">yes</dd>') == 2
    assert page.count("spectral persistence") == page.count("spectral flatness") == 4


def test_tempo_class_and_pitch_class():
    assert [tempo_class(bpm) for bpm in (89.4, 89.6, 130.4, 130.6)] == ["slow", "medium", "medium", "fast"]
    assert [pitch_class(name) for name in ("C", "Db", "F#", "Bb", "B", "G#")] == [0, 1, 6, 10, 11, 8]
