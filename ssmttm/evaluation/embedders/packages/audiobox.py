"""Audiobox aesthetics through the package audiobox_aesthetics: quality of a clip by four scores, without references."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.weights import import_package, load_pretrained, model_fingerprint


class AudioboxEmbedder:
    """Audiobox aesthetics (arXiv 2502.05139): content enjoyment (ce), content usefulness (cu), production complexity
    (pc) and production quality (pq) of every 10 s, about 1 to 10. `weights`: a folder or hub name."""

    name, sample_rate, seconds = "audiobox", 16_000, 10.0
    axes = ("ce", "cu", "pc", "pq")
    dim = len(axes)
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        package = import_package("audiobox", "audiobox_aesthetics", "audiobox_aesthetics.model.aes")
        source = weights or "facebook/audiobox-aesthetics"
        self.model = load_pretrained(package.AesMultiOutput.from_pretrained, source).to(device).eval()
        targets = [self.model.target_transform[axis.upper()] for axis in self.axes]
        self.mean = torch.tensor([float(target["mean"]) for target in targets])
        self.scale = torch.tensor([float(target["std"]) for target in targets])
        self.fingerprint = model_fingerprint(self.model, {"mean": self.mean.tolist(), "std": self.scale.tolist()})

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """The scores of windows of 10 s: wav [B, S] -> [B, W, 4]."""
        clips = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        device = next(self.model.parameters()).device
        found = self.model({"wav": clips.flatten(0, 1)[:, None].to(device)})
        scores = torch.stack([found[axis.upper()].float().cpu() for axis in self.axes], -1)  # [n, 4]
        return (scores * self.scale + self.mean).unflatten(0, clips.shape[:2])
