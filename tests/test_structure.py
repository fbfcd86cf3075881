"""Structure and comparison of music: sections, beginnings, ends, lags, and distances from true music."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from data_prep.builtin import compose, render
from ssmttm import audio
from ssmttm.audio import features
from ssmttm.errors import UserError
from ssmttm.evaluation.music.comparison import comparison_table, differences
from ssmttm.evaluation.music.music_metrics import measure_files
from ssmttm.evaluation.music.repetition import lag_similarity
from ssmttm.evaluation.music.signal_stats import clicks
from ssmttm.evaluation.music.structure import structure

RATE = features.SAMPLE_RATE


def melody(n_notes, seed, note=0.25):
    """Random tones of `note` seconds."""
    rng = np.random.default_rng(seed)
    time = torch.arange(int(note * RATE)) / RATE
    tones = [torch.sin(2 * torch.pi * 220 * 2 ** (rng.integers(0, 24) / 12) * time) * (-6 * time).exp()
             for _ in range(n_notes)]  # fmt: skip
    return 0.3 * torch.cat(tones)


def similarity(wav):
    wav = features.rms_normalise(wav[None])
    return lag_similarity(features.log_mel(wav)[0], features.chroma_log_frequency(wav)[0])


def test_lag_similarity_finds_repeated_bars_and_phrases():
    bars = similarity(melody(8, 1).repeat(5))  # bars of 2 s
    phrases = similarity(melody(20, 2).repeat(2))  # two phrases of 5 s
    unrelated = similarity(melody(40, 3))
    assert bars.bar > 0.9 and bars.phrase > 0.9
    assert phrases.phrase > 0.9 and phrases.bar < 0.5
    assert unrelated.bar < 0.5 and unrelated.phrase < 0.5
    assert math.isnan(similarity(torch.zeros(10 * RATE)).bar) and math.isnan(similarity(melody(20, 1)).phrase)


def test_clicks_are_counted_and_attacks_are_not():
    time = torch.arange(10 * RATE) / RATE
    tones = sum(0.1 * torch.sin(2 * torch.pi * hertz * time) for hertz in (220, 277, 1_330))[None]
    wav, steps = tones.clone(), tones.clone()
    assert clicks(wav, RATE) == 0
    noise = 0.1 * torch.randn(1, 10 * RATE, generator=torch.Generator().manual_seed(0))
    noise[:, : 5 * RATE] *= 0.01
    assert clicks(noise, RATE) == 0, "a loud attack after silence is no click"
    for start in range(1, 10):
        wav[0, start * RATE + 1_000] += 0.2 if start % 2 else -0.2
    assert clicks(wav, RATE) == pytest.approx(0.9)
    steps[:, 5 * RATE :] += 0.2
    assert clicks(steps, RATE) == pytest.approx(0.1)
    assert clicks(torch.zeros(1, RATE), RATE) == 0


def test_section_boundaries_lie_where_the_texture_changes():
    time = torch.arange(10 * RATE) / RATE
    noise = torch.randn(10 * RATE, generator=torch.Generator().manual_seed(0))
    beats = 0.2 * noise * (torch.arange(10 * RATE) % (RATE // 2) < 1_200)
    tone = 0.2 * torch.sin(2 * torch.pi * 220 * time)
    wav = torch.cat([tone, beats, tone + 0.2 * torch.sin(2 * torch.pi * 3_000 * time)])[None]
    found = structure(wav, RATE)
    assert [round(time) for time in found.boundaries] == [10, 20]
    steady = structure(torch.cat([tone, tone, tone])[None], RATE)
    assert len(steady.boundaries) == 0 and steady.novelty == 0 < found.novelty
    with pytest.raises(UserError, match="too short"):
        structure(wav[:, : 5 * RATE], RATE)


def test_whole_pieces_differ_from_excerpts_of_their_middle():
    pieces = [torch.from_numpy(render(compose(78, i)))[None] for i in range(6)]
    whole = [structure(wav, RATE) for wav in pieces]
    middle = [structure(wav[:, 6 * RATE : 26 * RATE], RATE) for wav in pieces]
    assert sum(a.last_onset > b.last_onset for a, b in zip(whole, middle, strict=True)) >= 5
    assert sum(a.end_level < b.end_level for a, b in zip(whole, middle, strict=True)) >= 5
    silent = structure(torch.zeros(1, 13 * RATE), RATE)
    assert silent.boundaries == () and silent.final_tonic == 0 and silent.end_level == 0


def test_comparison_is_zero_for_the_same_clips_and_grows(tmp_path):
    true, noisy = [], []
    for seed in range(4):
        wav = melody(16, seed)[None]
        true.append(audio.write(tmp_path / f"true-{seed}.wav", wav, RATE))
        hiss = 0.05 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(seed))
        noisy.append(audio.write(tmp_path / f"noisy-{seed}.wav", (wav + hiss).clamp(-1, 1), RATE))
    reference, other = measure_files(true, seconds=3.0), measure_files(noisy, seconds=3.0)
    assert all(clip.seconds == 3.0 for clip in reference.clips.values())
    same = differences(reference, reference)
    assert all(one.distance == 0 and one.mean == one.reference for one in same.values() if not math.isnan(one.distance))
    found = differences(reference, other)["chroma_entropy"]
    values = [[clip.chroma_entropy for clip in folder.clips.values()] for folder in (reference, other)]
    assert found.distance == pytest.approx(wasserstein_distance(*values) / np.std(values[0]))
    assert found.relative == pytest.approx(np.mean(values[1]) / np.mean(values[0]) - 1) and found.relative > 0
    rows = comparison_table("true", {"true": reference, "noisy": other})
    assert rows[0] == ["mean", "true", "noisy", "difference", "distance"]
    assert f"{100 * found.relative:+.0f} %" in next(row for row in rows if row[0] == "chroma_entropy")
