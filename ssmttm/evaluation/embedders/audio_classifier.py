"""Audio classification models of transformers, such as AST trained on AudioSet.

Shapes: B clips, S samples, N classes.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, fingerprint_of
from ssmttm.text.encoders import quiet_transformers

_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")


class AudioClassifier:
    """A checkpoint of AutoModelForAudioClassification, in safetensors.

    Args:
        weights: a folder, or a hub name such as MIT/ast-finetuned-audioset-10-10-0.4593 (AST, arXiv 2104.01778).
        device: of the network.

    Attributes:
        classes: the N names.
        exclusive: whether the classes are mutually exclusive (softmax) or not (sigmoid, as for AudioSet): from the
            config; without an entry there, whether there are two classes.
        fingerprint: 16 hex digits over weights and config.
    """

    def __init__(self, weights: str, device: str = "cpu") -> None:
        folder = checkpoint_folder(weights, _FILES, "audio classifier")
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no model*.safetensors: give the folder of a transformers audio classifier")
        extractor, model = _load(folder)
        self.fingerprint = fingerprint_of([*files, folder / "config.json"])
        self.extractor, self.model = extractor, model.to(device).eval().requires_grad_(False)
        self.sample_rate = int(extractor.sampling_rate)
        self.classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
        problem = model.config.problem_type
        self.exclusive = problem == "single_label_classification" if problem else len(self.classes) == 2

    @torch.inference_mode()
    def probabilities(self, wav: Tensor) -> Tensor:
        """Class probabilities: wav float32 [B, S] at `sample_rate` -> float32 [B, N] on the CPU."""
        clips = list(wav.cpu().numpy())
        inputs = self.extractor(clips, sampling_rate=self.sample_rate, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device)).logits.float().cpu()
        return logits.softmax(-1) if self.exclusive else logits.sigmoid()


def _load(folder: Path) -> tuple[Any, Any]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of AST's mel filters are empty by design
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        options: dict[str, Any] = {"trust_remote_code": False}
        try:
            architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
            if not any("AudioClassification" in kind or "SequenceClassification" in kind for kind in architectures):
                found = ", ".join(architectures) or "no known model"
                raise UserError(f"{folder} contains {found}: give an audio classifier")
            extractor = AutoFeatureExtractor.from_pretrained(folder, **options)
            model = AutoModelForAudioClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise UserError(f"cannot load the audio classifier in {folder}: {reason}") from error
    return extractor, model
