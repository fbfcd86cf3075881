"""CLAP and AST through transformers, the embedders of most published results."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.embedders.base import fingerprint, windows
from ssmttm.hub import split_revision


class ClapEmbedder:
    """CLAP (arXiv 2211.06687): audio and captions in one space.

    A window is exactly the clip that the checkpoint takes, so nothing is padded or cropped. A checkpoint with feature
    fusion gets no window as "longer" than that; transformers would draw one of each batch at random.
    """

    name = "clap"

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers import ClapModel, ClapProcessor

        source = weights or "laion/larger_clap_music"
        self.processor = _load(ClapProcessor.from_pretrained, source)
        self.model = _load(ClapModel.from_pretrained, source).to(device).eval()
        extractor = self.processor.feature_extractor
        self.sample_rate = int(extractor.sampling_rate)
        self.seconds = float(extractor.nb_max_samples / extractor.sampling_rate)
        self.dim = int(self.model.config.projection_dim)
        self.settings = {"fusion": "window only"} if self.model.config.audio_config.enable_fusion else {}
        self.fingerprint = _fingerprint(self.model, extractor, self.settings)

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Windows, mostly of 10 s, each of norm 1: wav [B, S] -> [B, W, D]."""
        windowed = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        clips = list(windowed.flatten(0, 1).numpy())
        inputs = self.processor(audio=clips, sampling_rate=self.sample_rate, return_tensors="pt")
        inputs["is_longer"] = torch.zeros(len(clips), 1, dtype=torch.bool)
        embeddings = _pooled(self.model.get_audio_features(**inputs.to(self.model.device)))
        return F.normalize(embeddings.float().cpu(), dim=-1).unflatten(0, windowed.shape[:2])

    def joint_audio(self, wav: Tensor) -> Tensor:
        """Mean of the windows, of norm 1: wav [B, S] -> [B, D]."""
        return F.normalize(self.embed(wav).mean(1), dim=-1)

    @torch.inference_mode()
    def joint_text(self, captions: Sequence[str]) -> Tensor:
        """Captions, each of norm 1: [n, D]."""
        inputs = self.processor(text=list(captions), padding=True, truncation=True, return_tensors="pt")
        embeddings = _pooled(self.model.get_text_features(**inputs.to(self.model.device)))
        return F.normalize(embeddings.float().cpu(), dim=-1)


class AstEmbedder:
    """The Audio Spectrogram Transformer (arXiv 2104.01778): AudioSet's classes, in place of PaSST."""

    name, seconds = "ast", 10.0
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers import ASTFeatureExtractor, ASTForAudioClassification

        source = weights or "MIT/ast-finetuned-audioset-10-10-0.4593"
        self.extractor = _load(ASTFeatureExtractor.from_pretrained, source)
        self.model = _load(ASTForAudioClassification.from_pretrained, source).to(device).eval()
        self.sample_rate, self.dim = int(self.extractor.sampling_rate), int(self.model.config.hidden_size)
        self.classes = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.fingerprint = _fingerprint(self.model, self.extractor, self.settings)

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


def _load(from_pretrained: Callable[..., Any], source: str) -> Any:
    name, revision = (source, None) if Path(source).is_dir() else split_revision(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return from_pretrained(name, **({"revision": revision} if revision else {}))
        except (OSError, ValueError) as error:
            reason = "no model in the folder" if Path(source).is_dir() else "not a folder, and download failed"
            raise UserError(f"cannot load {source} ({reason}): download it and give its folder") from error


def _pooled(output: Any) -> Tensor:
    """The projected embeddings, which transformers wraps since version 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _fingerprint(model: torch.nn.Module, extractor: Any, settings: Mapping[str, Any]) -> str:
    """16 hex digits over the weights, the settings of the feature extractor and those of the embedder."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().float().numpy().tobytes())
    values = {key: value for key, value in extractor.to_dict().items() if isinstance(value, int | float | str)}
    return fingerprint(digest.hexdigest(), {**values, **settings})
