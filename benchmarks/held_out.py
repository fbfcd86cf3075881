"""Held-out music of a built-in store as the reference for metrics of generated music.

Shapes: n prompts, K codebooks, T frames, S samples.
"""

import numpy as np
import torch
from torch import Tensor

from ssmttm import audio
from ssmttm.codecs import load_codec
from ssmttm.codecs.losses import spectral_distances
from ssmttm.data import open_store
from ssmttm.evaluation import frechet_distance, kernel_distance
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.metrics.kl import kl_divergence
from ssmttm.evaluation.protocol.balanced_prompts import balanced_prompts
from ssmttm.text.condition import TextCondition

FRAMES = 200  # 8 s, what the models were trained on
ATTRIBUTES = ("family", "tempo_class", "mode")


class HeldOutMusic:
    """Held-out captions with their codes and audio, and metrics of other codes for these captions."""

    def __init__(self, path: str, n: int, split: str = "test") -> None:
        self.store, self.codec = open_store(path), load_codec("tiny")
        self.store.require_codec(self.codec)
        self.prompts = balanced_prompts(self.store, n, seed=0, split=split)
        rows = [prompt.row for prompt in self.prompts]
        self.codes = torch.stack([torch.from_numpy(self.store.codes(row)[:, :FRAMES].astype(np.int64)) for row in rows])
        self.true = torch.stack([self._audio(row) for row in rows])  # [n, S]
        self.embedder, self.classifiers = load_embedder("tiny"), AttributeClassifiers.from_pretrained()
        others = np.concatenate([self.store.indices("valid"), self.store.indices("test")])
        music = torch.stack([self._audio(int(row)) for row in others if row not in rows])
        self.reference = self._embed(music)
        self.styles = self._styles(self.true)

    def text(self) -> tuple[TextCondition, TextCondition]:
        """The captions, and the empty caption."""
        captions = [*(prompt.caption for prompt in self.prompts), ""]
        rows = [torch.from_numpy(self.store.text(caption).astype(np.float32)) for caption in captions]
        return TextCondition.stack(rows[:-1]), TextCondition.stack(rows[-1:])

    def metrics(self, codes: Tensor) -> dict[str, float]:
        """Metrics of codes [n, K, T]; K may be smaller than the codec's."""
        whole = self.codec.n_codebooks
        self.codec.keep_codebooks(codes.shape[1])
        wav = torch.cat([self.codec.decode(part)[:, 0] for part in codes.split(8)])[:, : self.true.shape[1]]
        self.codec.keep_codebooks(whole)
        mel = spectral_distances(wav, self.true, self.codec.sample_rate)["mel"].item()
        return self.audio_metrics(wav) | {"mel": mel}

    def audio_metrics(self, wav: Tensor) -> dict[str, float]:
        """FAD, KAD and KL with the tiny embedder, and accuracy of the classified attributes. wav [n, S]."""
        predictions = [one for part in wav.split(8) for one in self.classifiers.predict(part, self.codec.sample_rate)]
        pairs = list(zip(predictions, self.prompts, strict=True))
        accuracies = {
            name: float(np.mean([getattr(predicted, name) == prompt.expected[name] for predicted, prompt in pairs]))
            for name in ATTRIBUTES
        }
        vectors = self._embed(wav)
        distances = {"fad": frechet_distance(vectors, self.reference), "kad": kernel_distance(vectors, self.reference)}
        divergence = kl_divergence(self._styles(wav), self.styles).mean().item()
        return {**distances, "kl": divergence, **accuracies}

    def _audio(self, row: int) -> Tensor:
        """[S]."""
        return audio.read(self.store.audio_path(row), self.codec.sample_rate)[0][0, : FRAMES * self.codec.hop_length]

    def _embed(self, wav: Tensor) -> Tensor:
        """Vectors of all windows, [N, D]."""
        return torch.cat([self.embedder.embed(part) for part in self._resampled(wav).split(8)]).flatten(0, 1).double()

    def _styles(self, wav: Tensor) -> Tensor:
        """Posteriors of the styles, [n, N]."""
        return torch.cat([self.embedder.posteriors(part) for part in self._resampled(wav).split(8)]).double()

    def _resampled(self, wav: Tensor) -> Tensor:
        return audio.resample(wav, self.codec.sample_rate, self.embedder.sample_rate)
