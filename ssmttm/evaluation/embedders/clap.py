"""CLAP through transformers: the embedder of FAD and of the CLAP score in most published results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.laion_clap import load_laion_clap
from ssmttm.evaluation.embedders.weights import checkpoint_fingerprint, load_pretrained


class ClapEmbedder:
    """CLAP (arXiv 2211.06687): audio and captions in one space; a folder or hub name of transformers' format, or a file
    of LAION.

    A window is exactly the clip that the checkpoint takes, so nothing is padded or cropped. A checkpoint with feature
    fusion gets no window as "longer" than that; transformers would draw one of each batch at random.
    """

    name = "clap"

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers import ClapModel, ClapProcessor

        source = weights or "laion/larger_clap_music"
        if Path(source).is_file():
            model, self.processor = load_laion_clap(Path(source))
        else:
            self.processor = load_pretrained(ClapProcessor.from_pretrained, source)
            model = load_pretrained(ClapModel.from_pretrained, source)
        self.model = model.to(device).eval()
        extractor = self.processor.feature_extractor
        self.sample_rate = int(extractor.sampling_rate)
        self.seconds = float(extractor.nb_max_samples / extractor.sampling_rate)
        self.dim = int(self.model.config.projection_dim)
        self.settings = {"fusion": "window only"} if self.model.config.audio_config.enable_fusion else {}
        self.fingerprint = checkpoint_fingerprint(self.model, extractor, self.settings)

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


def _pooled(output: Any) -> Tensor:
    """The projected embeddings, which transformers wraps since version 5."""
    return output if isinstance(output, Tensor) else output.pooler_output
