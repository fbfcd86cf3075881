"""Checks of generated audio: silence, clipping, noise by spectral flatness and persistence, difference between clips.

They find audio that is no music at all; none of them tells whether music is good. Pure functions of audio [S] or
[1, S], float in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.audio import features, resample
from ssmttm.audio.defects import SILENCE_RMS

NOISE_FLATNESS = 0.5615  # of white Gaussian noise: exp(-Euler's constant)
CLIPPED_LEVEL, MAX_CLIPPED = 0.999, 1e-3
MIN_PERSISTENCE = 0.62  # between built-in music, true or decoded, and a barely trained model: docs/evaluation.md
_FFT = 2048
_SHORT_FFT, _HOP, _LAG, _BAND = 1024, 256, 8, 8  # at 24 kHz: frames 85 ms apart, bands of 190 Hz


@dataclass(frozen=True)
class AudioCheck:
    """Checks of one clip."""

    rms: float  # full scale is 1
    peak: float
    clipped_fraction: float  # of samples at full scale
    flatness: float  # spectral flatness, 0 (a pure tone) to about 0.56 (white noise)
    persistence: float  # spectral persistence, 0 (noise) to 1 (steady tones)
    silent: bool  # RMS below -60 dBFS
    clipped: bool  # more than a thousandth of the samples at full scale
    noisy: bool  # persistence below MIN_PERSISTENCE, or flatness closer to white noise than to music on a log scale
    finite: bool

    @property
    def good(self) -> bool:
        """Finite, and not silent, clipped or noisy."""
        return self.finite and not (self.silent or self.clipped or self.noisy)

    def summary(self) -> str:
        """What is wrong, in one line; "no defect found" if nothing is."""
        defects = {
            "contains NaN or infinity": not self.finite,
            f"silent (RMS {self.rms:.2g})": self.silent,
            f"clipped ({100 * self.clipped_fraction:.2g} % of the samples)": self.clipped,
            f"noise-like (flatness {self.flatness:.3f}, persistence {self.persistence:.2f})": self.noisy,
        }
        return ", ".join(text for text, found in defects.items() if found) or "no defect found"


def check_audio(wav: Tensor, sample_rate: int, reference_flatness: float) -> AudioCheck:
    """Check one clip; `reference_flatness` is a high quantile of real music (`adherence.music_flatness`)."""
    finite = bool(wav.isfinite().all())
    wav = torch.nan_to_num(wav.float()).flatten()
    rms, size = float(wav.square().mean().sqrt()), wav.abs()
    clipped, flatness = float((size >= CLIPPED_LEVEL).float().mean()), spectral_flatness(wav, sample_rate)
    limit, persistence = flatness_limit(reference_flatness), spectral_persistence(wav, sample_rate)
    return AudioCheck(
        rms=rms,
        peak=float(size.max()),
        clipped_fraction=clipped,
        flatness=flatness,
        persistence=persistence,
        silent=rms < SILENCE_RMS,
        clipped=clipped > MAX_CLIPPED,
        noisy=rms >= SILENCE_RMS and (flatness > limit or persistence < MIN_PERSISTENCE),
        finite=finite,
    )


def flatness_limit(reference_flatness: float) -> float:
    """The flatness above which a clip is noise: the geometric mean of that of music and of white noise."""
    return math.sqrt(max(reference_flatness, 1e-6) * NOISE_FLATNESS)


def spectral_persistence(wav: Tensor, sample_rate: int) -> float:
    """How far the peaks of the spectrum stay where they are for 85 ms, as those of notes do and those of noise do not.

    The correlation, over the bins of a band of 190 Hz, of the magnitudes of two frames that are 85 ms apart; mean over
    the bands from 100 Hz to 5 kHz weighted by the smaller of the two powers, median over time. Coloured noise has 0,
    decoded random codes about 0.3, music mostly more than 0.7. Music of drums alone is low, too. 0 for silence.
    wav [S] or [1, S].
    """
    wav = resample(wav.float().flatten(), sample_rate, features.SAMPLE_RATE)
    if len(wav) < _SHORT_FFT + _LAG * _HOP:
        wav = torch.nn.functional.pad(wav, (0, _SHORT_FFT + _LAG * _HOP - len(wav)))
    window = torch.hann_window(_SHORT_FFT)
    spectrum = torch.stft(wav, _SHORT_FFT, _HOP, window=window, center=False, return_complex=True).abs()
    hertz = torch.linspace(0, features.SAMPLE_RATE / 2, _SHORT_FFT // 2 + 1)
    bins = spectrum[(hertz >= 100) & (hertz <= 5_000)]
    bands = bins[: len(bins) // _BAND * _BAND].unflatten(0, (-1, _BAND))  # [bands, bins, T]
    power = bands.square().sum(1)
    shape = bands - bands.mean(1, keepdim=True)
    shape = shape / shape.norm(dim=1, keepdim=True).clamp_min(1e-9)
    correlation = (shape[..., :-_LAG] * shape[..., _LAG:]).sum(1)  # [bands, T]
    weight = torch.minimum(power[:, :-_LAG], power[:, _LAG:])
    level = weight.sum(0)
    loud = (level > 1e-3 * level.max()) & (level > 1e-9)
    if not bool(loud.any()):
        return 0.0
    return float(((correlation * weight).sum(0)[loud] / level[loud]).median())


def spectral_flatness(wav: Tensor, sample_rate: int, low: float = 100.0, high: float = 8_000.0) -> float:
    """Geometric over arithmetic mean of the power spectrum between two frequencies in Hz, median over time.

    Frames more than 40 dB below the loudest are excluded; 0 for silence. wav [S] or [1, S].
    """
    wav = wav.float().flatten()
    spectrum = (
        torch.stft(wav, _FFT, _FFT // 2, window=torch.hann_window(_FFT), pad_mode="constant", return_complex=True)
        .abs()
        .square()
    )
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
