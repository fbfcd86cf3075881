"""Quality metrics of codecs, and the filterbanks that they read."""

import librosa
import numpy as np
import pytest
import torch
from small_codecs import RATE, small_codec, tones

from ssmttm.audio.features import chroma_filterbank, chroma_stft, mel_filterbank, onset_times
from ssmttm.codecs.losses import SCALES
from ssmttm.codecs.metrics import (
    chroma_similarity,
    codebook_statistics,
    codec_quality,
    onset_f_measure,
)

# Filterbanks


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
