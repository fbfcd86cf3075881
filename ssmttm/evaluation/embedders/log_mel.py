"""Log-mel statistics as embeddings, without weights; comparable only with themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmttm.audio import features
from ssmttm.evaluation.embedders.base import windows


class LogMelEmbedder:
    """Mean, standard deviation and mean rise of each mel band within a window. The level is not normalised."""

    name, sample_rate, seconds, dim = "log_mel", features.SAMPLE_RATE, 1.0, 3 * features.N_MELS
    settings: Mapping[str, Any] = {}
    fingerprint = f"log-mel-stats-v{features.VERSION}"

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 1 s: wav [B, S] -> [B, W, D]."""
        windowed = windows(wav, self.sample_rate)  # [B, W, s]
        mel = features.log_mel(windowed.flatten(0, 1))  # [B * W, N_MELS, T]
        rise = features.spectral_flux(mel)
        return torch.cat([mel.mean(-1), mel.std(-1), rise.mean(-1)], -1).unflatten(0, windowed.shape[:2])
