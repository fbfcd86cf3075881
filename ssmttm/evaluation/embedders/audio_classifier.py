"""Audio classification models of transformers, such as an AST trained on AudioSet: how likely each class is heard.

Shapes: B clips, S samples, N classes.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.hub import checkpoint_folder, fingerprint_of
from ssmttm.text.encoders import quiet_transformers

_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")


class AudioClassifier:
    """A checkpoint that AutoModelForAudioClassification knows, in safetensors.

    Args:
        weights: a folder, or a hub name such as MIT/ast-finetuned-audioset-10-10-0.4593 (AST, arXiv 2104.01778).
        device: where it runs.

    Attributes:
        classes: the N names.
        exclusive: whether one class excludes the others (softmax) or not (sigmoid, as for AudioSet): as the config
            says, else whether there are just two.
        fingerprint: 16 hex digits over weights and config.

    Raises:
        UserError: there is no such checkpoint, or it classifies no audio.
    """

    def __init__(self, weights: str, device: str = "cpu") -> None:
        folder = checkpoint_folder(weights, _FILES, "audio classifier")
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no model*.safetensors: an audio classifier is a folder of transformers")
        extractor, model = _load(folder)
        self.fingerprint = fingerprint_of([*files, folder / "config.json"])
        self.extractor, self.model = extractor, model.to(device).eval().requires_grad_(False)
        self.sample_rate = int(extractor.sampling_rate)
        self.classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
        stated = model.config.problem_type
        self.exclusive = stated == "single_label_classification" if stated else len(self.classes) == 2

    @torch.inference_mode()
    def probabilities(self, wav: Tensor) -> Tensor:
        """How likely each class is heard: wav float32 [B, S] at `sample_rate` -> float32 [B, N] on the CPU."""
        clips = list(wav.cpu().numpy())
        inputs = self.extractor(clips, sampling_rate=self.sample_rate, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device)).logits.float().cpu()
        return logits.softmax(-1) if self.exclusive else logits.sigmoid()


def _load(folder: Path) -> tuple[Any, Any]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of AST's mel filters, some of which are empty by design
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        options: dict[str, Any] = {"trust_remote_code": False}
        try:
            kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
            if not any("AudioClassification" in kind or "SequenceClassification" in kind for kind in kinds):
                raise UserError(f"{folder} holds {', '.join(kinds) or 'no known model'}: name an audio classifier")
            extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
            model = AutoModelForAudioClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the audio classifier in {folder} cannot be loaded: {reason}") from error
    return extractor, model
