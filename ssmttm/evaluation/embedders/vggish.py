"""VGGish, the network of the first FAD; its weights must be supplied.

Parameter names are those of the published PyTorch file, which is loaded as tensors only.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.audio.features import mel_filterbank
from ssmttm.evaluation.embedders.base import fingerprint, windows
from ssmttm.evaluation.embedders.weights import load_weights


class VggishEmbedder(nn.Module):
    """VGGish (arXiv 1609.09430): 128 values for every 0.96 s, without the PCA of YouTube-8M.

    The values are those of the last linear layer, before its ReLU, as in the implementations that published FADs are
    computed with; torchvggish itself applies the ReLU.
    `weights`: a .safetensors or .pth file with the names of torchvggish (features.0.weight, embeddings.0.weight ...).
    """

    name, sample_rate, seconds, dim = "vggish", 16_000, 0.96, 128
    settings: Mapping[str, Any] = {"activation": "none"}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for widths in ((64,), (128,), (256, 256), (512, 512)):
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128)
        )
        self.fingerprint = fingerprint(load_weights(self, weights, "vggish", ignore=("pproc.",)), self.settings)
        self.to(device).eval()

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 0.96 s: wav [B, S] -> [B, W, 128]."""
        device = next(self.parameters()).device
        n_windows = windows(wav, round(self.seconds * self.sample_rate)).shape[1]
        frames = F.pad(wav, (0, 240)).unfold(-1, 400, 160)[:, : n_windows * 96]  # [B, W * 96, 400]
        frames = frames.unflatten(1, (n_windows, 96)).flatten(0, 1) * torch.hann_window(400)  # [n, 96, 400]
        bank = mel_filterbank(16_000, 512, 64, 125.0, 7500.0, scale="htk", norm=None, triangles="mel")
        mel = torch.log(torch.fft.rfft(frames, 512).abs() @ bank.T + 0.01)
        hidden = self.features(mel[:, None].to(device)).permute(0, 2, 3, 1).flatten(1)
        return self.embeddings(hidden).cpu().unflatten(0, (len(wav), n_windows))
