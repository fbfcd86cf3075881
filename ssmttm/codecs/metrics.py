"""Codec metrics: spectral distance, chroma similarity, onset F-measure, codebook usage."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.audio.features import chroma_stft, onset_times, stft_magnitude
from ssmttm.codecs.base import Codec
from ssmttm.codecs.losses import spectral_distances
from ssmttm.codecs.stereo.parametric import band_matrix

ONSET_TOLERANCE = 0.05  # seconds, as in MIREX
_STEREO_FRAME, _STEREO_BANDS = 0.04, 20  # seconds


@torch.no_grad()
def codec_quality(codec: Codec, wav: Tensor, encoder: Codec | None = None) -> dict[str, float]:
    """Metrics of held-out audio after encoding and decoding.

    Args:
        wav: float [B, 1, S], at least one second.
        encoder: codec that encodes, for a student that decodes its teacher's codes; default: `codec`.

    Returns:
        `mel_distance` (log10 magnitudes), `chroma_similarity` in [0, 1], `onset_f` in [0, 1], `kbps`, `codebook_usage`
        (fraction of the entries that occur) and `codebook_perplexity`, both the minimum over codebooks.
    """
    codes = (encoder or codec).encode(wav)
    decoded, original = codec.decode(codes)[:, 0, : wav.shape[-1]], wav[:, 0]
    usage, perplexity = codebook_statistics(codes, codec.codebook_size)
    rate = codec.sample_rate
    return {
        "mel_distance": spectral_distances(decoded, original, rate)["mel"].item(),
        "chroma_similarity": chroma_similarity(decoded, original, rate).mean().item(),
        "onset_f": onset_f_measure(decoded, original, rate).mean().item(),
        "kbps": codec.frame_rate * codec.n_codebooks * math.log2(codec.codebook_size) / 1000,
        "codebook_usage": usage.min().item(),
        "codebook_perplexity": perplexity.min().item(),
    }


class StereoErrors(NamedTuple):
    """How far the channels of decoded stereo audio are from those of the original, means over the batch.

    Attributes:
        level: error of the level difference of the channels in dB, in bands, differences being at most 30 dB.
        phase: error of the phase between the channels in radians, in bands where they are related.
        width: error of the side's fraction of the energy, in bands.
        total_width: the same of the whole clip.
        mel_distance: of the left and the right channel, log10 magnitudes.
    """

    level: float
    phase: float
    width: float
    total_width: float
    mel_distance: float


@torch.no_grad()
def stereo_errors(decoded: Tensor, original: Tensor, sample_rate: int) -> StereoErrors:
    """Errors of decoded audio [B, 2, S]. Bands are those of `band_matrix`, frames of 40 ms, both weighted by the
    original's amplitude."""
    window = 2 * round(_STEREO_FRAME * sample_rate / 2)
    bank = band_matrix(sample_rate, window, _STEREO_BANDS).to(original.device)
    found, true = (_band_covariance(wav, window, bank) for wav in (decoded, original))
    weight = (true.left + true.right).sqrt()  # [B, N, T]
    weight = weight * (weight > 1e-3 * weight.amax())
    related = weight * (true.product.abs() / (true.left * true.right).sqrt().clamp_min(1e-9))

    def mean(error: Tensor, weights: Tensor) -> float:
        return float((error * weights).sum() / weights.sum().clamp_min(1e-9))

    phase = (found.product * true.product.conj()).angle().abs()
    mel = spectral_distances(decoded.flatten(0, 1), original.flatten(0, 1), sample_rate)["mel"]
    return StereoErrors(
        mean((found.level - true.level).abs(), weight),
        mean(phase, related),
        mean((found.width - true.width).abs(), weight),
        float((_total_width(decoded) - _total_width(original)).abs().mean()),
        mel.item(),
    )


class _BandCovariance(NamedTuple):
    """Energies of left and right, float, and their product, complex, [B, N, T] each."""

    left: Tensor
    right: Tensor
    product: Tensor

    @property
    def level(self) -> Tensor:
        floor = 1e-3 * (self.left + self.right) + 1e-9
        return 10 * (self.left.maximum(floor) / self.right.maximum(floor)).log10()

    @property
    def width(self) -> Tensor:
        total = self.left + self.right
        return (total - 2 * self.product.real) / (2 * total + 1e-9)


def _band_covariance(wav: Tensor, window: int, bank: Tensor) -> _BandCovariance:
    spectrum = torch.stft(
        wav.float().flatten(0, 1), window, window // 4, window=torch.hann_window(window, device=wav.device),
        return_complex=True,
    ).unflatten(0, (-1, 2))  # fmt: skip  # [B, 2, F, T]
    left, right = spectrum.transpose(2, 3).unbind(1)  # [B, T, F] each
    product = left * right.conj()
    parts = left.abs().square(), right.abs().square(), product.real, product.imag
    left_energy, right_energy, real, imaginary = (F.avg_pool1d((part @ bank).mT, 4, 1) for part in parts)
    return _BandCovariance(left_energy, right_energy, torch.complex(real, imaginary))


def _total_width(wav: Tensor) -> Tensor:
    """The side's fraction of the energy of [B, 2, S]: [B]."""
    left, right = wav.unbind(1)
    energy = wav.square().sum((1, 2))
    return (left - right).square().sum(-1) / (2 * energy).clamp_min(1e-9)


def codebook_statistics(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Fraction of the entries that occur, and perplexity exp(H): codes [B, K, T] -> float [K], float [K]."""
    counts = torch.stack([torch.bincount(row.flatten(), minlength=codebook_size) for row in codes.unbind(1)]).double()
    p = counts / counts.sum(dim=1, keepdim=True)  # [K, V]
    return (counts > 0).float().mean(dim=1), torch.special.entr(p).sum(dim=1).exp().float()


def chroma_similarity(output: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Cosine similarity of the chroma of two waveforms [B, S], averaged over `target`'s audible frames: [B]."""
    audible = stft_magnitude(target, 2048, floor=1e-5).square().mean(dim=1) > 1e-4  # [B, T]
    cosine = F.cosine_similarity(chroma_stft(output, sample_rate), chroma_stft(target, sample_rate), dim=1)
    return (cosine * audible).sum(dim=1) / audible.sum(dim=1).clamp_min(1)


def onset_f_measure(output: Tensor, target: Tensor, sample_rate: int, tolerance: float = ONSET_TOLERANCE) -> Tensor:
    """F-measure of the onsets of `output` [B, S] against those of `target` [B, S]: [B]; 1 where neither has any."""
    pairs = zip(onset_times(output, sample_rate), onset_times(target, sample_rate), strict=True)
    return torch.tensor([_f_measure(a.tolist(), b.tolist(), tolerance) for a, b in pairs])


def _f_measure(found: list[float], true: list[float], tolerance: float) -> float:
    if not found and not true:
        return 1.0
    hits = i = j = 0
    while i < len(found) and j < len(true):  # both ascend: pairing the earliest that fit gives a maximum matching
        if abs(found[i] - true[j]) <= tolerance:
            hits, i, j = hits + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return 2 * hits / (len(found) + len(true))
