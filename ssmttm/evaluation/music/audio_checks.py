"""Checks of generated audio: silence, clipping, noise by spectral flatness, difference between clips.

Pure functions of audio [S] or [1, S], float in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.audio import features, resample
from ssmttm.audio.defects import SILENCE_RMS

NOISE_FLATNESS = 0.5615  # of white Gaussian noise: exp(-Euler's constant)
CLIPPED_LEVEL, MAX_CLIPPED = 0.999, 1e-3
_FFT = 2048


@dataclass(frozen=True)
class AudioCheck:
    """Checks of one clip."""

    rms: float  # full scale is 1
    peak: float
    clipped_fraction: float  # of samples at full scale
    flatness: float  # spectral flatness, 0 (a pure tone) to about 0.56 (white noise)
    silent: bool  # RMS below -60 dBFS
    clipped: bool  # more than a thousandth of the samples at full scale
    noisy: bool  # on a log scale, the flatness is closer to that of white noise than to the reference
    finite: bool

    @property
    def good(self) -> bool:
        """Finite, and not silent, clipped or noisy."""
        return self.finite and not (self.silent or self.clipped or self.noisy)


def check_audio(wav: Tensor, sample_rate: int, reference_flatness: float) -> AudioCheck:
    """Check one clip; `reference_flatness` is a high quantile of real music (`adherence.music_flatness`)."""
    finite = bool(wav.isfinite().all())
    wav = torch.nan_to_num(wav.float()).flatten()
    rms, size = float(wav.square().mean().sqrt()), wav.abs()
    clipped, flatness = float((size >= CLIPPED_LEVEL).float().mean()), spectral_flatness(wav, sample_rate)
    limit = math.sqrt(max(reference_flatness, 1e-6) * NOISE_FLATNESS)
    return AudioCheck(
        rms=rms,
        peak=float(size.max()),
        clipped_fraction=clipped,
        flatness=flatness,
        silent=rms < SILENCE_RMS,
        clipped=clipped > MAX_CLIPPED,
        noisy=rms >= SILENCE_RMS and flatness > limit,
        finite=finite,
    )


def spectral_flatness(wav: Tensor, sample_rate: int, low: float = 100.0, high: float = 8_000.0) -> float:
    """Geometric over arithmetic mean of the power spectrum between two frequencies in Hz, median over time.

    Frames more than 40 dB below the loudest are excluded; 0 for silence. wav [S] or [1, S].
    """
    wav = wav.float().flatten()
    spectrum = torch.stft(
        wav, _FFT, _FFT // 2, window=torch.hann_window(_FFT), pad_mode="constant", return_complex=True
    ).abs().square()
    hertz = torch.linspace(0, sample_rate / 2, _FFT // 2 + 1)
    power = spectrum[(hertz >= low) & (hertz <= high)]  # [F, T]
    mean = power.mean(0)
    loud = (mean > 1e-4 * mean.max()) & (mean > 1e-12)
    if not bool(loud.any()):
        return 0.0
    flatness = power[:, loud].clamp_min(1e-20).log().mean(0).exp() / mean[loud]
    return float(flatness.median())


def pairwise_difference(wavs: list[Tensor], sample_rate: int) -> Tensor:
    """RMS difference of the log-mel spectrograms of all pairs of clips, in dB.

    Clips are RMS-normalised and truncated to the shortest. Identical clips give 0, unrelated music about 10 dB or more.
    wavs: n times [S] or [1, S] -> [n, n].
    """
    rows = [resample(wav.float().reshape(1, -1), sample_rate, features.SAMPLE_RATE) for wav in wavs]
    shortest = min(row.shape[-1] for row in rows)
    mels = torch.cat([features.log_mel(features.rms_normalise(row[:, :shortest])) for row in rows])
    mels = mels * 20  # [n, M, T] in dB
    return torch.stack([(mels - mel).square().mean((1, 2)).sqrt() for mel in mels])
