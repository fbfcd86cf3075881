"""Multi-resolution complex-STFT discriminator."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class DiscriminatorOutput(NamedTuple):
    """Output of one resolution: logits [B, 1, T', F'] (high for real audio) and each layer's features."""

    logits: Tensor
    features: list[Tensor]


class STFTDiscriminator(nn.Module):
    """2-D convolutions over a complex spectrogram (EnCodec, arXiv 2210.13438, section 3.4, with earlier strides).

    `window` is the STFT window in samples; the hop is half of it.
    """

    window: Tensor

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        shapes = [((3, 9), (1, 4)), ((3, 9), (1, 2)), ((3, 9), (2, 2)), ((3, 3), (1, 1))]  # kernel, stride over [T, F]
        self.layers = nn.ModuleList(
            _conv(channels if i else 2, channels, kernel, stride) for i, (kernel, stride) in enumerate(shapes)
        )
        self.output = _conv(channels, 1, (3, 3), (1, 1))

    def forward(self, wav: Tensor) -> DiscriminatorOutput:
        """wav [B, 1, S]."""
        n = len(self.window)
        spectrum = torch.stft(wav[:, 0].float(), n, n // 2, window=self.window, normalized=True, return_complex=True)
        x = rearrange(torch.view_as_real(spectrum), "b f t two -> b two t f")
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return DiscriminatorOutput(self.output(x), features)


class MultiResolutionDiscriminator(nn.Module):
    """One `STFTDiscriminator` per window, in samples."""

    def __init__(self, windows: tuple[int, ...] = (2048, 1024, 512), channels: int = 24) -> None:
        super().__init__()
        self.scales = nn.ModuleList(STFTDiscriminator(window, channels) for window in windows)

    def forward(self, wav: Tensor) -> list[DiscriminatorOutput]:
        """wav [B, 1, S], S > half the longest window -> one output per resolution."""
        return [scale(wav) for scale in self.scales]


def _conv(width: int, channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(width, channels, kernel, stride, padding))
