"""STFT magnitudes with a backward pass of their own: one inverse FFT of real length, and no padding at the ends.

Autograd through `torch.stft` computes complex FFTs of the full length and scatters frames into the waveform; this takes
little more than half the time. Shapes: B items, S samples, T = (S - window) // hop + 1 frames, F bins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def magnitudes(wav: Tensor, window: int, hop: int, bins: int | None = None, floor: float = 1e-5) -> Tensor:
    """Magnitudes of the STFT with a Hann window, of frames that lie wholly inside: float32 [B, S] -> [B, T, F].

    Args:
        window: samples, a multiple of `hop` and at most S.
        bins: F, from 0 Hz up; None: window / 2 + 1.
        floor: magnitudes are clamped to at least this.
    """
    if window % hop or window > wav.shape[-1]:
        raise ValueError(f"window={window} must be a multiple of hop={hop} and fit into {wav.shape[-1]} samples")
    return _Magnitudes.apply(wav, window, hop, bins or window // 2 + 1, floor)


def magnitudes_reference(wav: Tensor, window: int, hop: int, bins: int | None = None, floor: float = 1e-5) -> Tensor:
    """`magnitudes` by plain autograd."""
    spectrum = torch.fft.rfft(wav.unfold(-1, window, hop) * torch.hann_window(window, device=wav.device))
    spectrum = spectrum[..., : bins or window // 2 + 1]
    return (spectrum.real.square() + spectrum.imag.square()).clamp_min(floor**2).sqrt()


class _Magnitudes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wav: Tensor, window: int, hop: int, bins: int, floor: float) -> Tensor:
        hann = torch.hann_window(window, device=wav.device)
        spectrum = torch.fft.rfft(wav.unfold(-1, window, hop) * hann)[..., :bins]  # [B, T, F]
        parts = torch.view_as_real(spectrum)
        magnitude = parts.square().sum(-1).clamp_min_(floor**2).sqrt_()
        ctx.save_for_backward(spectrum, magnitude, hann)
        ctx.hop, ctx.floor, ctx.samples = hop, floor, wav.shape[-1]
        return magnitude

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        spectrum, magnitude, hann = ctx.saved_tensors
        window, hop = len(hann), ctx.hop
        # irfft counts each bin twice except the first and the last of window / 2 + 1
        scaled = torch.where(magnitude > ctx.floor, gradient / magnitude, 0.0).mul_(0.5)  # [B, T, F]
        scaled[..., 0] *= 2
        if scaled.shape[-1] == window // 2 + 1:
            scaled[..., -1] *= 2
        frames = torch.fft.irfft(spectrum * scaled, window, norm="forward").mul_(hann)  # [B, T, window]
        parts = frames.unflatten(-1, (-1, hop)).unbind(dim=2)
        last = len(parts) - 1
        wav = frames.new_zeros(len(frames), frames.shape[1] + last, hop)
        for i, part in enumerate(parts):
            wav[:, i : i + part.shape[1]] += part
        return F.pad(wav.flatten(1), (0, ctx.samples - wav.shape[1] * hop)), None, None, None, None
