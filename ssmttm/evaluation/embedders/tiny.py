"""A small audio-text embedder and tagger that ships with the package; valid for the built-in corpus only.

A convolutional network over a log-mel spectrogram, pooled over time by mean and standard deviation. The result is
the embedding; one head classifies the style, another projects into a joint space with captions (contrastive, as CLAP,
arXiv 2206.04769), whose text features are the token states of MiniLM. Trained by `ssmttm.cli.train_embedder`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.audio import features
from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.pretrained import load_network, network_fingerprint, save_network
from ssmttm.text.encoders import MINILM, load_text_encoder

ASSETS = Path(__file__).parents[2] / "assets" / "embedder"
_WIDTH, _JOINT = 96, 128
_TEXT_DIM = 384  # MiniLM's


class TinyEmbedder(nn.Module):
    """The embedder; `from_pretrained` loads the shipped one. `card`: training settings and held-out accuracy."""

    name, sample_rate, seconds, dim = "tiny", features.SAMPLE_RATE, 5.0, 2 * _WIDTH
    settings: Mapping[str, Any] = {}

    def __init__(self, classes: Sequence[str], card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.classes, self.card = list(classes), card or {}
        self.body = nn.Sequential(
            _block(nn.Conv2d(1, 24, 5, (2, 2), 2, bias=False)),
            _block(nn.Conv2d(24, 48, 3, (2, 2), 1, bias=False)),
            _block(nn.Conv2d(48, 64, 3, (2, 1), 1, bias=False)),
            _block(nn.Conv2d(64, 64, 3, (2, 2), 1, bias=False)),
        )
        self.mix = nn.Sequential(
            nn.Conv1d(64 * features.N_MELS // 16, 128, 1), nn.ReLU(),
            nn.Conv1d(128, 128, 5, padding=2), nn.ReLU(),
            nn.Conv1d(128, _WIDTH, 5, padding=2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(self.dim), nn.Dropout(0.2))
        self.tag = nn.Linear(self.dim, len(self.classes))
        self.audio_joint = nn.Sequential(nn.Linear(self.dim, 256), nn.GELU(), nn.Linear(256, _JOINT))
        self.text_joint = nn.Sequential(nn.Linear(_TEXT_DIM, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, _JOINT))
        self.log_scale = nn.Parameter(torch.tensor(2.7))

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "TinyEmbedder":
        """Load an embedder from a folder, by default the shipped one."""
        fix = "train one with `python -m ssmttm.cli.train_embedder`"
        return load_network(Path(path or ASSETS), lambda card: cls(card["classes"], card), "embedder", fix)

    def save(self, folder: str | Path) -> None:
        """Write config.json (the card) and model.safetensors (float16 weights) into a folder."""
        save_network(self, {**self.card, "classes": self.classes}, Path(folder))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the weights as stored (float16) and the classes."""
        return network_fingerprint(self, self.classes)

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Embeddings of windows of 5 s: wav [B, S] -> [B, W, D]."""
        windowed = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        mel = features.log_mel(features.rms_normalise(windowed.flatten(0, 1)))
        return self.pool(mel).unflatten(0, windowed.shape[:2])

    @torch.inference_mode()
    def posteriors(self, wav: Tensor) -> Tensor:
        """Style probabilities of each clip, averaged over windows: wav [B, S] -> [B, N]."""
        return self.tag(self.head(self.embed(wav))).softmax(-1).mean(1)

    @torch.inference_mode()
    def joint_audio(self, wav: Tensor) -> Tensor:
        """Joint embedding of each clip, averaged over windows: wav [B, S] -> [B, E] of norm 1."""
        return F.normalize(F.normalize(self.audio_joint(self.head(self.embed(wav))), dim=-1).mean(1), dim=-1)

    @torch.inference_mode()
    def joint_text(self, captions: Sequence[str]) -> Tensor:
        """Joint embedding of each caption: [n, E] of norm 1."""
        encoder = load_text_encoder(MINILM)
        text = encoder.encode(list(captions))
        return F.normalize(self.text_joint(mean_pool(text.embeddings, text.mask)), dim=-1)

    def pool(self, mel: Tensor) -> Tensor:
        """The embedding of log-mel spectrograms: [B, MELS, T] -> [B, D]."""
        hidden = self.mix(self.body(mel[:, None]).flatten(1, 2))  # [B, C, T / 8]
        return torch.cat([hidden.mean(-1), hidden.std(-1)], -1)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of valid tokens: [n, L, E], mask [n, L] -> [n, E]."""
    valid = mask[..., None].to(states.dtype)
    return (states * valid).sum(1) / valid.sum(1)


def _block(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())
