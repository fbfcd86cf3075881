"""CNN14 of PANNs, an AudioSet tagger for KL; its weights must be supplied.

Parameter names are those of the published PyTorch file, which is loaded as tensors only.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.audio.features import mel_filterbank, stft_magnitude
from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.weights import load_weights


class PannsEmbedder(nn.Module):
    """CNN14 of PANNs (arXiv 1912.10211): 2,048 values and AudioSet's 527 classes.

    `weights`: a .safetensors or .pth file with the published names (conv_block1.conv1.weight, fc1.weight ...).
    """

    name, sample_rate, seconds, dim = "panns", 32_000, 10.0, 2048
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(64)
        sizes = (1, 64, 128, 256, 512, 1024, 2048)
        for i, (channels, out_channels) in enumerate(pairwise(sizes), start=1):
            setattr(self, f"conv_block{i}", _PannsBlock(channels, out_channels))
        self.fc1 = nn.Linear(2048, 2048)
        self.fc_audioset = nn.Linear(2048, 527)
        self.classes = [f"AudioSet {i}" for i in range(527)]
        computed = ("spectrogram_extractor.", "logmel_extractor.")  # a window and a filter bank
        self.fingerprint = load_weights(self, weights, "panns", ignore=computed)
        self.to(device).eval()

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 10 s: wav [B, S] -> [B, W, 2048]."""
        return self._predict(wav)[0]

    def posteriors(self, wav: Tensor) -> Tensor:
        """AudioSet's classes: sigmoids normalised to a sum of 1, averaged over windows: wav [B, S] -> [B, 527]."""
        scores = self._predict(wav)[1].sigmoid()
        return (scores / scores.sum(-1, keepdim=True)).mean(1)

    @torch.inference_mode()
    def _predict(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and logits of each window."""
        device = self.fc1.weight.device
        clips = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        power = stft_magnitude(clips.flatten(0, 1), 1024, 320).square()
        mel = 10 * (mel_filterbank(32_000, 1024, 64, 50.0, 14_000.0) @ power).clamp_min(1e-10).log10()  # [n, 64, T]
        hidden = self.bn0(mel.to(device)[..., None]).permute(0, 3, 2, 1)  # [n, 1, T, 64]
        for i in range(1, 7):
            hidden = getattr(self, f"conv_block{i}")(hidden, pool=2 if i < 6 else 1)
        hidden = hidden.mean(3)  # [n, 2048, T / 32]
        pooled = F.relu(self.fc1(hidden.amax(2) + hidden.mean(2)))
        outputs = (pooled, self.fc_audioset(pooled))
        return tuple(output.cpu().unflatten(0, clips.shape[:2]) for output in outputs)


class _PannsBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, pool: int) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.avg_pool2d(x, pool)
