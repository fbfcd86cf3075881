"""Codec latents as embeddings: mean and standard deviation within a window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmttm.codecs import load_codec
from ssmttm.evaluation.embedders.base import windows


class CodecEmbedder:
    """Latents of a codec (`weights`: its name or folder), pooled over windows of 2 s."""

    name, seconds = "codec", 2.0
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        self.codec = load_codec(weights or "tiny").to(device).eval()
        self.sample_rate, self.fingerprint = self.codec.sample_rate, self.codec.fingerprint
        probe = torch.zeros(1, 1, self.sample_rate, device=device)
        self.dim = 2 * self.codec.to_latents(self.codec.encode(probe)).shape[1]

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 2 s: wav [B, S] -> [B, W, D]."""
        windowed = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        device = next(self.codec.parameters()).device
        latents = self.codec.to_latents(self.codec.encode(windowed.flatten(0, 1)[:, None].to(device))).float().cpu()
        return torch.cat([latents.mean(-1), latents.std(-1)], -1).unflatten(0, windowed.shape[:2])
