"""No weights at all: what a second of log-mel spectrogram looks like. Comparable with nothing but itself."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ssmttm.audio import features
from ssmttm.evaluation.embedders.base import windows


class LogMelEmbedder:
    """Mean, standard deviation and mean rise of each mel band within a window. The level is left as it is."""

    name, sample_rate, seconds, dim = "log_mel", features.SAMPLE_RATE, 1.0, 3 * features.MELS

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the code that makes the features."""
        return hashlib.sha256(Path(features.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 1 s: wav [B, S] -> [B, W, D].

        Raises:
            UserError: a clip is shorter than one window.
        """
        cut = windows(wav, self.sample_rate)  # [B, W, s]
        mel = features.log_mel(cut.flatten(0, 1))  # [B * W, MELS, T]
        rise = mel.diff(dim=-1).clamp_min(0)
        return torch.cat([mel.mean(-1), mel.std(-1), rise.mean(-1)], -1).unflatten(0, cut.shape[:2])
