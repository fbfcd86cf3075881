"""How well a codec keeps the music: spectra, pitch classes, onsets, and how it uses its codebooks."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.codecs.base import Codec
from ssmttm.codecs.losses import log_mel, magnitude, mel_filterbank, spectral_distances

ONSET_TOLERANCE = 0.05  # seconds, as in MIREX
_ONSET_WINDOW, _ONSET_MELS = 1024, 64


@torch.no_grad()
def codec_quality(codec: Codec, wav: Tensor, encoder: Codec | None = None) -> dict[str, float]:
    """Encode and decode held-out audio and measure what became of it.

    Args:
        codec: any.
        wav: float [B, 1, S], S of a second or more.
        encoder: makes the codes; None: the codec does. A student decodes those of its teacher.

    Returns:
        `mel_distance` (log10 magnitudes), `chroma_similarity` in [0, 1], `onset_f` in [0, 1], `kbps`, `codebook_usage`
        (share of the entries that occur) and `codebook_perplexity`, the last two the lowest over codebooks.
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


def codebook_statistics(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Share of the entries that occur, and perplexity exp(H) of their use: codes [B, K, T] -> float [K], float [K]."""
    counts = torch.stack([torch.bincount(row.flatten(), minlength=codebook_size) for row in codes.unbind(1)]).double()
    p = counts / counts.sum(dim=1, keepdim=True)  # [K, V]
    return (counts > 0).float().mean(dim=1), torch.special.entr(p).sum(dim=1).exp().float()


def chroma(wav: Tensor, sample_rate: int, window: int = 2048) -> Tensor:
    """Energy by pitch class, the largest of each frame scaled to 1: [B, S] -> [B, 12, T] (C first).

    Equal to librosa's chroma_stft with tuning 0 (Ellis 2007, chroma feature analysis), but for the frames at the ends.
    """
    energy = chroma_filterbank(sample_rate, window).to(wav.device) @ magnitude(wav, window).square()
    return energy / energy.amax(dim=1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)


def frame_chroma(wav: Tensor, sample_rate: int, n_frames: int) -> Tensor:
    """`chroma` at the rate of a codec's frames, as a melody for a denoiser: [B, S] -> [B, 12, n_frames], 0 to 1."""
    window, length = 2048, wav.shape[-1]
    embeddings = chroma(F.pad(wav, (0, max(0, window - length))), sample_rate, window)  # a window at the least
    return F.adaptive_avg_pool1d(embeddings[..., : length // (window // 4) + 1], n_frames)


def chroma_similarity(fake: Tensor, real: Tensor, sample_rate: int) -> Tensor:
    """Cosine of the chroma vectors of two waveforms [B, S], mean over the frames that are not silent in `real`: [B]."""
    embeddings = magnitude(real, 2048).square().mean(dim=1) > 1e-4  # [B, T]
    cosine = F.cosine_similarity(chroma(fake, sample_rate), chroma(real, sample_rate), dim=1)
    return (cosine * embeddings).sum(dim=1) / embeddings.sum(dim=1).clamp_min(1)


@lru_cache(maxsize=8)
def chroma_filterbank(sample_rate: int, window: int) -> Tensor:
    """Gaussian pitch-class filters, weighted towards the octaves around C5 (librosa.filters.chroma with tuning 0).

    Returns:
        float32 [12, window / 2 + 1].
    """
    frequencies = torch.arange(1, window, dtype=torch.float64) * sample_rate / window
    bins = 12 * (frequencies * 16 / 440).log2()  # semitones above A0
    bins = torch.cat([bins[:1] - 18, bins])  # [window]
    width = torch.cat([bins.diff().clamp_min(1), bins.new_ones(1)])
    distance = (bins - torch.arange(12.0, dtype=torch.float64)[:, None] + 6 + 120) % 12 - 6  # [12, window]
    weights = torch.exp(-0.5 * (2 * distance / width) ** 2)
    weights = F.normalize(weights, dim=0) * torch.exp(-0.5 * ((bins / 12 - 5) / 2) ** 2)
    return weights.roll(-3, dims=0)[:, : window // 2 + 1].float()


def onset_times(wav: Tensor, sample_rate: int) -> list[Tensor]:
    """Onsets by peaks of the spectral flux (Dixon, DAFx 2006): wav [B, S] -> B tensors of seconds, ascending."""
    mels = log_mel(magnitude(wav, _ONSET_WINDOW), mel_filterbank(sample_rate, _ONSET_WINDOW, _ONSET_MELS, wav.device))
    flux = mels.clamp_min(-3).diff(dim=-1).clamp_min(0).mean(dim=1)  # [B, T - 1]
    step = _ONSET_WINDOW / 4 / sample_rate
    near, far = max(1, round(0.03 / step)), max(1, round(0.1 / step))
    highest = F.max_pool1d(flux[:, None], 2 * near + 1, 1, near)[:, 0]
    mean = F.avg_pool1d(flux[:, None], 2 * far + 1, 1, far)[:, 0]
    peaks = (flux == highest) & (flux > mean + 0.05)
    return [(row.nonzero()[:, 0] + 1) * step for row in peaks]


def onset_f_measure(fake: Tensor, real: Tensor, sample_rate: int, tolerance: float = ONSET_TOLERANCE) -> Tensor:
    """F-measure of the onsets of `fake` [B, S] against those of `real` [B, S]: [B]; 1 where neither has any."""
    pairs = zip(onset_times(fake, sample_rate), onset_times(real, sample_rate), strict=True)
    return torch.tensor([_f_measure(a.tolist(), b.tolist(), tolerance) for a, b in pairs])


def _f_measure(found: list[float], true: list[float], tolerance: float) -> float:
    if not found and not true:
        return 1.0
    hits = i = j = 0
    while i < len(found) and j < len(true):  # in ascending order, pairing the earliest that fit is a largest matching
        if abs(found[i] - true[j]) <= tolerance:
            hits, i, j = hits + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return 2 * hits / (len(found) + len(true))
