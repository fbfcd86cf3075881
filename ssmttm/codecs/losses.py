"""Losses of codec training: spectra at several resolutions, and the adversarial terms."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.codecs.base import CodecOutput
from ssmttm.codecs.discriminators import DiscriminatorOutput


class Scale(NamedTuple):
    """One STFT resolution: window in samples (hop a quarter of it) and mel bands."""

    window: int
    n_mels: int


# The long window with many bands holds the pitch, the short ones the onsets; bands in DAC's ratio (5 per 64 samples).
SCALES = (Scale(4096, 320), Scale(2048, 160), Scale(1024, 80), Scale(512, 40), Scale(256, 20))
FLOOR = 1e-5  # magnitudes below count as silence


def reconstruction_losses(
    output: CodecOutput, wav: Tensor, sample_rate: int = 24000, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """Everything a codec is trained on but the adversarial terms.

    Args:
        output: of a codec's forward.
        wav: what was encoded, [B, 1, S].
        sample_rate: in Hz.
        scales: STFT resolutions; those longer than S are left out.

    Returns:
        Scalars: `mel` and `spectrum` of `spectral_distances`, and the quantiser's `codebook` and `commitment`.
    """
    return {**spectral_distances(output.audio[:, 0], wav[:, 0], sample_rate, scales), **output.losses}


def spectral_distances(
    fake: Tensor, real: Tensor, sample_rate: int, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """Distances between the spectra of two waveforms [B, S], each the mean over scales; computed in float32.

    Returns:
        Scalars: `mel`, the L1 distance of log10 mel magnitudes (DAC, arXiv 2306.06546); `spectrum`, the L1 distance of
        magnitudes in units of the target's mean magnitude: it weighs what is loud, that is the partials of notes.
    """
    fitting = [scale for scale in scales if scale.window <= real.shape[-1]]
    if not fitting:
        raise ValueError(f"{real.shape[-1]} samples are shorter than every window of {scales}")
    mel, spectrum = [], []
    with torch.autocast(real.device.type, enabled=False):
        for window, n_mels in fitting:
            a, b = magnitude(fake.float(), window), magnitude(real.float(), window)  # [B, F, T]
            bank = mel_filterbank(sample_rate, window, n_mels, a.device)
            mel.append(F.l1_loss(log_mel(a, bank), log_mel(b, bank)))
            loudness = b.mean(dim=(1, 2)).clamp_min(1e-3)
            spectrum.append(((a - b).abs().mean(dim=(1, 2)) / loudness).mean())
    return {"mel": torch.stack(mel).mean(), "spectrum": torch.stack(spectrum).mean()}


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Hinge loss of a discriminator: real audio against its reconstruction (EnCodec, arXiv 2210.13438, section 3.4)."""
    terms = [F.relu(1 - r.logits).mean() + F.relu(1 + f.logits).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def adversarial_losses(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> dict[str, Tensor]:
    """What the codec learns from the discriminator (EnCodec, arXiv 2210.13438, section 3.4).

    Args:
        real: judgements on the original audio; taken without gradient.
        fake: judgements on the reconstruction.

    Returns:
        Scalars: `adversarial`, the hinge generator loss; `feature`, the L1 distance of the layers' features in units
        of the real ones' mean magnitude.
    """
    adversarial = torch.stack([-judgement.logits.mean() for judgement in fake]).mean()
    pairs = [
        (a, b.detach()) for f, r in zip(fake, real, strict=True) for a, b in zip(f.features, r.features, strict=True)
    ]
    feature = torch.stack([F.l1_loss(a, b) / b.abs().mean().clamp_min(1e-5) for a, b in pairs]).mean()
    return {"adversarial": adversarial, "feature": feature}


def magnitude(wav: Tensor, window: int) -> Tensor:
    """Magnitude spectrogram with a Hann window and a hop of a quarter: [B, S] -> [B, window / 2 + 1, T]."""
    taps = _hann(window, wav.device)
    spectrum = torch.stft(wav, window, window // 4, window=taps, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp_min(FLOOR**2).sqrt()


def log_mel(magnitudes: Tensor, bank: Tensor) -> Tensor:
    """log10 of mel magnitudes: [B, F, T], [n_mels, F] -> [B, n_mels, T]."""
    return (bank @ magnitudes).clamp_min(FLOOR).log10()


@lru_cache(maxsize=64)
def mel_filterbank(sample_rate: int, window: int, n_mels: int, device: torch.device | None = None) -> Tensor:
    """Triangular mel filters of unit area, 0 Hz to Nyquist, on the mel scale of Slaney's Auditory Toolbox (1998).

    Returns:
        float32 [n_mels, window / 2 + 1].
    """
    top = _hz_to_mel(sample_rate / 2)
    edges = _mel_to_hz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))  # [n_mels + 2]
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    width = edges.diff()
    rising = (frequencies - edges[:-2, None]) / width[:-1, None]
    falling = (edges[2:, None] - frequencies) / width[1:, None]
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float().to(device)


_BREAK_HZ, _LINEAR_HZ, _LOG_STEP = 1000.0, 200 / 3, math.log(6.4) / 27  # linear below 1 kHz, logarithmic above


def _hz_to_mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < _BREAK_HZ else _BREAK_HZ / _LINEAR_HZ + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    above = _BREAK_HZ * ((mel - _BREAK_HZ / _LINEAR_HZ) * _LOG_STEP).exp()
    return torch.where(mel < _BREAK_HZ / _LINEAR_HZ, mel * _LINEAR_HZ, above)


@lru_cache(maxsize=64)
def _hann(window: int, device: torch.device) -> Tensor:
    return torch.hann_window(window, device=device)
