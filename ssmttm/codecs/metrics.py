"""Codec metrics: spectral distance, chroma similarity, onset F-measure, codebook usage."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.audio.features import chroma_stft, onset_times, stft_magnitude
from ssmttm.codecs.base import Codec
from ssmttm.codecs.losses import spectral_distances

ONSET_TOLERANCE = 0.05  # seconds, as in MIREX


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
