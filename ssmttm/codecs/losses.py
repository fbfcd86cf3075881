"""Losses of codec training: multi-resolution spectral losses and the adversarial terms."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.audio.features import mel_filterbank, stft_magnitude
from ssmttm.codecs.base import CodecOutput
from ssmttm.codecs.discriminators import DiscriminatorOutput


class Scale(NamedTuple):
    """One STFT resolution: window in samples (the hop is a quarter of it) and number of mel bands."""

    window: int
    n_mels: int


# Long windows resolve pitch, short ones onsets; 5 bands per 64 samples, as in DAC.
SCALES = (Scale(4096, 320), Scale(2048, 160), Scale(1024, 80), Scale(512, 40), Scale(256, 20))
FLOOR = 1e-5  # magnitudes are clamped to at least this


def reconstruction_losses(
    output: CodecOutput, wav: Tensor, sample_rate: int = 24000, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """All losses of a codec except the adversarial terms.

    Args:
        wav: the encoded audio, [B, 1, S].
        scales: STFT resolutions; those longer than S are skipped.

    Returns:
        Scalars: `mel` and `spectrum` of `spectral_distances`, and the quantiser's `codebook` and `commitment`.
    """
    return {**spectral_distances(output.audio[:, 0], wav[:, 0], sample_rate, scales), **output.losses}


def spectral_distances(
    output: Tensor, target: Tensor, sample_rate: int, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """Distances between the spectra of two waveforms [B, S], averaged over the scales; computed in float32.

    Returns:
        Scalars: `mel`, the L1 distance of log10 mel magnitudes (DAC, arXiv 2306.06546); `spectrum`, the L1 distance of
        magnitudes relative to the target's mean magnitude, which emphasises the loud partials of notes.
    """
    fitting = [scale for scale in scales if scale.window <= target.shape[-1]]
    if not fitting:
        raise ValueError(f"{target.shape[-1]} samples are shorter than every window of {scales}")
    mel, spectrum = [], []
    with torch.autocast(target.device.type, enabled=False):
        for window, n_mels in fitting:
            a, b = (stft_magnitude(wav.float(), window, floor=FLOOR) for wav in (output, target))  # [B, F, T]
            bank = mel_filterbank(sample_rate, window, n_mels, device=a.device)
            log_mel_a, log_mel_b = ((bank @ magnitude).clamp_min(FLOOR).log10() for magnitude in (a, b))
            mel.append(F.l1_loss(log_mel_a, log_mel_b))
            loudness = b.mean(dim=(1, 2)).clamp_min(1e-3)
            spectrum.append(((a - b).abs().mean(dim=(1, 2)) / loudness).mean())
    return {"mel": torch.stack(mel).mean(), "spectrum": torch.stack(spectrum).mean()}


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Hinge loss of the discriminator (EnCodec, arXiv 2210.13438, section 3.4)."""
    terms = [F.relu(1 - r.logits).mean() + F.relu(1 + f.logits).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def adversarial_losses(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> dict[str, Tensor]:
    """Generator losses of the codec (EnCodec, arXiv 2210.13438, section 3.4).

    `adversarial`, the hinge generator loss; `feature`, the L1 feature-matching distance relative to the mean magnitude
    of the real features, which are detached.
    """
    adversarial = torch.stack([-output.logits.mean() for output in fake]).mean()
    pairs = [
        (a, b.detach()) for f, r in zip(fake, real, strict=True) for a, b in zip(f.features, r.features, strict=True)
    ]
    feature = torch.stack([F.l1_loss(a, b) / b.abs().mean().clamp_min(1e-5) for a, b in pairs]).mean()
    return {"adversarial": adversarial, "feature": feature}
