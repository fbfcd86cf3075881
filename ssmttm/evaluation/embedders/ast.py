"""The Audio Spectrogram Transformer through transformers, an AudioSet tagger for KL."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.weights import checkpoint_fingerprint, load_pretrained


class AstEmbedder:
    """The Audio Spectrogram Transformer (arXiv 2104.01778): AudioSet's classes, in place of PaSST."""

    name, seconds = "ast", 10.0
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers import ASTFeatureExtractor, ASTForAudioClassification

        source = weights or "MIT/ast-finetuned-audioset-10-10-0.4593"
        self.extractor = load_pretrained(ASTFeatureExtractor.from_pretrained, source)
        self.model = load_pretrained(ASTForAudioClassification.from_pretrained, source).to(device).eval()
        self.sample_rate, self.dim = int(self.extractor.sampling_rate), int(self.model.config.hidden_size)
        self.classes = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.fingerprint = checkpoint_fingerprint(self.model, self.extractor, self.settings)

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 10 s: wav [B, S] -> [B, W, D]."""
        return self._predict(wav)[0]

    def posteriors(self, wav: Tensor) -> Tensor:
        """Softmax over AudioSet's classes, averaged over windows: wav [B, S] -> [B, N]."""
        return self._predict(wav)[1].softmax(-1).mean(1)

    @torch.inference_mode()
    def _predict(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and logits of each window."""
        windowed = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        clips = list(windowed.flatten(0, 1).numpy())
        inputs = self.extractor(clips, sampling_rate=self.sample_rate, return_tensors="pt").to(self.model.device)
        pooled = self.model.audio_spectrogram_transformer(**inputs).pooler_output
        logits = self.model.classifier(pooled)
        return tuple(output.float().cpu().unflatten(0, windowed.shape[:2]) for output in (pooled, logits))
