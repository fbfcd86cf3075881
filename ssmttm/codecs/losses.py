"""Losses of codec training: multi-resolution spectral losses and the adversarial terms."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.audio.features import mel_filterbank, stft_magnitude
from ssmttm.codecs.base import CodecOutput
from ssmttm.codecs.discriminators import DiscriminatorOutput
from ssmttm.codecs.notes import semitone_filterbank
from ssmttm.codecs.spectra import magnitudes


class Scale(NamedTuple):
    """One STFT resolution: window in samples (the hop is a quarter of it) and number of mel bands."""

    window: int
    n_mels: int


# Long windows resolve pitch, short ones onsets; 5 bands per 64 samples, as in DAC.
SCALES = (Scale(4096, 320), Scale(2048, 160), Scale(1024, 80), Scale(512, 40), Scale(256, 20))
FLOOR = 1e-5  # magnitudes are clamped to at least this
PITCH_WINDOW, PITCH_LIMIT = 8192, 1500.0  # samples, Hz: where notes have their loudest partials
NOTE_WINDOWS = (4096, 2048)
FLUX_WINDOW = 1024  # the longest of `flux`


def reconstruction_losses(
    output: CodecOutput, wav: Tensor, sample_rate: int = 24000, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """All losses of a codec except the adversarial terms.

    Args:
        wav: the encoded audio, [B, C, S]; of stereo, `channel_signals` are compared.
        scales: STFT resolutions; those longer than S are skipped.

    Returns:
        Scalars: `mel` and `spectrum` of `spectral_distances`, and the quantiser's `codebook` and `commitment`, or a
        VAE's `kl`.
    """
    signals = channel_signals(output.audio), channel_signals(wav)
    return {**spectral_distances(*signals, sample_rate, scales), **output.losses}


def channel_signals(wav: Tensor) -> Tensor:
    """The signals [B', S] of audio [B, C, S] whose spectra are compared: the one channel of mono; of stereo left,
    right, mid and side, (left + right) / 2 and (left - right) / 2, as the phase between the channels is in these."""
    if wav.shape[1] == 1:
        return wav[:, 0]
    left, right = wav.unbind(1)
    return torch.cat([left, right, (left + right) / 2, (left - right) / 2])


def spectral_distances(
    output: Tensor, target: Tensor, sample_rate: int, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """Distances between the spectra of two waveforms [B, S], averaged over the scales; computed in float32.

    Returns:
        Scalars: `mel`, the L1 distance of log10 mel magnitudes (DAC, arXiv 2306.06546); `spectrum`, the L1 distance of
        magnitudes relative to the target's mean magnitude, which emphasises the loud partials of notes.
    """
    mel, spectrum = [], []
    with torch.autocast(target.device.type, enabled=False):
        for window, n_mels in _fitting(scales, target.shape[-1]):
            a, b = (stft_magnitude(wav.float(), window, floor=FLOOR) for wav in (output, target))  # [B, F, T]
            bank = mel_filterbank(sample_rate, window, n_mels, device=a.device)
            log_mel_a, log_mel_b = ((bank @ magnitude).clamp_min(FLOOR).log10() for magnitude in (a, b))
            mel.append(F.l1_loss(log_mel_a, log_mel_b))
            loudness = b.mean(dim=(1, 2)).clamp_min(1e-3)
            spectrum.append(((a - b).abs().mean(dim=(1, 2)) / loudness).mean())
    return {"mel": torch.stack(mel).mean(), "spectrum": torch.stack(spectrum).mean()}


def fast_distances(
    output: Tensor, target: Tensor, sample_rate: int, scales: tuple[Scale, ...] = SCALES
) -> dict[str, Tensor]:
    """Distances of two waveforms [B, S] for training: of frames that lie inside and overlap by half, at half the cost
    of `spectral_distances`; computed in float32. Windows longer than S are left out.

    Returns:
        Scalars: `mel` and `spectrum`, as in `spectral_distances`; `flux`, the L1 distance of the changes of log10 mel
        magnitudes from frame to frame in short windows, for onsets; `pitch`, the L1 distance of magnitudes below
        PITCH_LIMIT in a window long enough to separate bass notes; `notes`, that of the magnitude in each semitone
        (`ssmttm.codecs.notes`). The last two are relative to the target's mean in the frame, so that quiet passages
        count as much as loud ones.
    """
    with torch.autocast(target.device.type, enabled=False):
        a, b = output.float(), target.float()
        mel, spectrum, notes, flux = [], [], [], []
        for window, n_mels in _fitting(scales, a.shape[-1]):
            bank = mel_filterbank(sample_rate, window, n_mels, device=a.device).T  # [F, M]
            magnitude_a, magnitude_b = (magnitudes(wav, window, window // 2) for wav in (a, b))  # [B, T, F]
            log_mel_a, log_mel_b = ((m @ bank).clamp_min(FLOOR).log10() for m in (magnitude_a, magnitude_b))
            mel.append(F.l1_loss(log_mel_a, log_mel_b))
            if window <= FLUX_WINDOW:
                flux.append(F.l1_loss(log_mel_a.diff(dim=1), log_mel_b.diff(dim=1)))
            loudness = magnitude_b.mean(dim=(1, 2)).clamp_min(1e-3)
            spectrum.append(((magnitude_a - magnitude_b).abs().mean(dim=(1, 2)) / loudness).mean())
            if window in NOTE_WINDOWS:
                bank = semitone_filterbank(sample_rate, window, device=a.device).T  # [F, N]
                note_a, note_b = ((m.square() @ bank).clamp_min(FLOOR**2).sqrt() for m in (magnitude_a, magnitude_b))
                notes.append(_relative((note_a - note_b).abs(), note_b))
        window, bins = _low_band(PITCH_WINDOW, PITCH_LIMIT, sample_rate, a.shape[-1])
        magnitude_a, magnitude_b = (magnitudes(wav, window, window // 4, bins) for wav in (a, b))
        pitch = _relative((magnitude_a - magnitude_b).abs(), magnitude_b)
    means = {"mel": mel, "spectrum": spectrum, "flux": flux, "notes": notes}
    return {"pitch": pitch} | {name: torch.stack(values).mean() for name, values in means.items() if values}


def _fitting(scales: tuple[Scale, ...], samples: int) -> list[Scale]:
    fitting = [scale for scale in scales if scale.window <= samples]
    if not fitting:
        raise ValueError(f"{samples} samples are shorter than every window of {scales}")
    return fitting


def _low_band(window: int, limit: float, sample_rate: int, samples: int) -> tuple[int, int]:
    """The window, halved until it fits into the crop, and its number of bins up to `limit` Hz."""
    while window > samples:
        window //= 2
    return window, min(round(limit * window / sample_rate), window // 2) + 1


def _relative(difference: Tensor, target: Tensor) -> Tensor:
    """Mean difference [B, T, F] over the target's mean magnitude in each frame, but no less than a tenth of that in the
    whole item, averaged over frames."""
    level = target.mean(dim=2)  # [B, T]
    level = torch.maximum(level, 0.1 * level.mean(dim=1, keepdim=True)).clamp_min(1e-2)
    return (difference.mean(dim=2) / level).mean()


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Hinge loss of the discriminator (EnCodec, arXiv 2210.13438, section 3.4)."""
    terms = [F.relu(1 - r.logits).mean() + F.relu(1 + f.logits).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def discriminator_accuracy(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Fraction of the logits with the right sign, mean of real and fake audio and of the resolutions: 0.5 is chance."""
    right = [
        ((r.logits > 0).float().mean() + (f.logits < 0).float().mean()) / 2 for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(right).mean()


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
