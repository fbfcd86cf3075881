"""Modules of the spectral codec: STFT features, ConvNeXt blocks, inverse-STFT head (Vocos, arXiv 2306.00814)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LOG_MAGNITUDE = 6.0  # keeps the head's exp() finite; full scale is about log(window / 2)


class STFT(nn.Module):
    """Hann-windowed STFT whose frame t is centred on hop t, and its least-squares inverse.

    A waveform of n hops gives n frames and back: no frame extends past the ends, so whole and streamed audio agree.
    `window`, in samples, is a multiple of 2 * hop.
    """

    window: Tensor

    def __init__(self, window: int, hop: int) -> None:
        super().__init__()
        self.hop, self.margin = hop, (window - hop) // 2
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, n * hop] -> complex spectrum [B, n, window / 2 + 1]."""
        frames = F.pad(wav, (self.margin, self.margin)).unfold(-1, len(self.window), self.hop)  # [B, n, window]
        return torch.fft.rfft(frames * self.window)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Complex spectrum [B, n, window / 2 + 1] -> wav [B, n * hop] (Griffin & Lim 1984, equation 6)."""
        return self.join(torch.fft.irfft(spectrum, len(self.window)))

    def join(self, frames: Tensor) -> Tensor:
        """Windowed overlap-add of frames [B, n, window] -> wav [B, n * hop]."""
        weights = self.window.square().expand(1, frames.shape[1], -1)
        inside = slice(self.margin, self.margin + frames.shape[1] * self.hop)
        return self._overlap_add(frames * self.window)[:, inside] / self._overlap_add(weights)[:, inside]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        parts = frames.unflatten(-1, (-1, self.hop)).unbind(dim=2)
        last = len(parts) - 1
        total = sum(F.pad(part, (0, 0, i, last - i)) for i, part in enumerate(parts))  # [B, n + last, hop]
        return total.flatten(1)


def spectral_features(spectrum: Tensor) -> Tensor:
    """Log magnitude and compressed real and imaginary parts: complex [B, n, F] -> [B, n, 3F]."""
    magnitude = spectrum.abs().clamp_min(1e-5)
    compressed = spectrum * magnitude.pow(-0.7)
    return torch.cat([magnitude.log() / 4 + 0.5, compressed.real, compressed.imag], dim=-1)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise MLP of width D * expansion (arXiv 2201.03545; Vocos).

    `look_ahead` of the kernel's taps are in the future; `scale` is the initial scale of the residual branch.
    """

    def __init__(self, width: int, expansion: int, kernel: int, look_ahead: int, scale: float) -> None:
        super().__init__()
        self.padding = (kernel - 1 - look_ahead, look_ahead)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.depthwise(F.pad(x.transpose(1, 2), self.padding)).transpose(1, 2)
        return x + self.scale * self.contract(F.gelu(self.expand(self.norm(y))))


class Stack(nn.Sequential):
    """ConvNeXt blocks at one frame rate. Arguments as `ConvNeXtBlock`."""

    def __init__(self, n_blocks: int, width: int, expansion: int, kernel: int, look_ahead: int) -> None:
        scale = 1 / max(n_blocks, 1)
        super().__init__(*(ConvNeXtBlock(width, expansion, kernel, look_ahead, scale) for _ in range(n_blocks)))


class InverseSTFTHead(nn.Module):
    """Log magnitude and phase from features, then the inverse STFT (Vocos, section 3.2)."""

    def __init__(self, width: int, stft: STFT) -> None:
        super().__init__()
        self.stft = stft
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 2 * (len(stft.window) // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> wav [B, n * hop]."""
        log_magnitude, phase = self.project(self.norm(x)).float().chunk(2, dim=-1)
        return self.synthesise(log_magnitude, phase)

    def synthesise(self, log_magnitude: Tensor, phase: Tensor) -> Tensor:
        """Natural-log magnitude and phase in radians, both [B, n, F] -> wav [B, n * hop]."""
        magnitude = log_magnitude.clamp(max=MAX_LOG_MAGNITUDE).exp()
        return self.inverse(magnitude * phase.cos(), magnitude * phase.sin())

    def inverse(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """The two parts of a spectrum, both [B, n, F] -> wav [B, n * hop]."""
        return self.stft.inverse(torch.complex(real, imaginary))


def decoder_context(
    blocks: tuple[int, int], look_ahead: tuple[int, int], kernel: int, upsampling: int, stft: STFT
) -> tuple[int, int]:
    """Code frames of history and of look-ahead that one frame of audio depends on: ConvNeXt blocks at the frame rate
    and at `upsampling` times the frame rate, then an inverse STFT."""
    overlap = math.ceil(stft.margin / stft.hop)  # neighbours in the inverse STFT
    (coarse, fine), (ahead, ahead_fine) = blocks, look_ahead
    past, past_fine = kernel - 1 - ahead, kernel - 1 - ahead_fine
    history = coarse * past + math.ceil((fine * past_fine + overlap) / upsampling)
    return history, coarse * ahead + math.ceil((fine * ahead_fine + overlap) / upsampling)
