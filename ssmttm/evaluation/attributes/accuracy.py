"""Accuracy of the attribute classifiers on held-out music, directly and after the reconstruction by a codec or VAE."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import Autoencoder, Codec, encoder_of
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.classifiers import (
    WINDOW,
    AttributeClassifiers,
    AttributePrediction,
    pitch_class,
    tempo_class,
    third,
)

ATTRIBUTES = ("family", "tempo_class", "mode")


def reconstruct_with_codec(
    codec: Autoencoder, wav: Tensor, sample_rate: int, encoder: Autoencoder | None = None
) -> Tensor:
    """Encode (with `encoder`, by default the codec itself) and decode mono audio: [1, S] at `sample_rate` -> [1, S]. A
    codec or VAE of two channels gets the same on both, and their mean is returned."""
    encoder = encoder or codec
    resampled = audio.resample(wav, sample_rate, codec.sample_rate).expand(codec.channels, -1)
    with torch.inference_mode():
        frames = encoder.encode(resampled[None].to(next(encoder.parameters()).device))
        decoded = codec.decode(frames.to(next(codec.parameters()).device))[0].mean(0, keepdim=True)
    return audio.resample(decoded.cpu().clone(), codec.sample_rate, sample_rate)[:, : wav.shape[-1]]


def window_of(store: Store, row: int, seconds: float = WINDOW) -> Tensor:
    """A window of a segment's audio at the features' rate; its start depends on the row only. [1, S]."""
    wav, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
    size = int(seconds * features.SAMPLE_RATE)
    start = int(np.random.default_rng(row).integers(max(0, wav.shape[-1] - size) + 1))
    return wav[:, start : start + size]


def annotations_of(store: Store, row: int) -> dict[str, Any]:
    """Ground-truth annotations of a segment. Raises UserError if it has none."""
    annotations = store.annotations(row)
    if annotations is None:
        raise UserError(f"{store.path} has no ground-truth annotations: use a store of the built-in corpus")
    return annotations


def expected_labels(annotations: dict[str, Any]) -> dict[str, str]:
    """The true class of each of ATTRIBUTES."""
    tempo = tempo_class(annotations["bpm"])
    return {"family": annotations["lead"]["family"], "tempo_class": tempo, "mode": annotations["mode"]}


def correct(prediction: AttributePrediction, annotations: dict[str, Any]) -> dict[str, bool]:
    """Which attributes of a clip are predicted correctly; the tempo in bpm within 4 %."""
    tonic = pitch_class(prediction.key) == pitch_class(annotations["key"])
    return {
        **{name: getattr(prediction, name) == label for name, label in expected_labels(annotations).items()},
        "third": prediction.third == third(annotations["mode"]),
        "tonic": tonic,
        "key_and_mode": tonic and prediction.mode == annotations["mode"],
        "bpm_within_4_percent": abs(prediction.bpm / annotations["bpm"] - 1) <= 0.04,
    }


def accuracy(
    classifiers: AttributeClassifiers,
    store: Store,
    rows: np.ndarray,
    codec: Autoencoder | None = None,
    seconds: float = WINDOW,
) -> dict[str, Any]:
    """Accuracy over one window of each row.

    Returns:
        `true`, and `reconstructed` if a codec or VAE is given: each with `n`, the accuracy of every key of `correct`,
        and `confusion`, a table {attribute: {true class: {predicted class: count}}}.
    """
    found = {"true": _accuracy(classifiers, store, rows, None, seconds)}
    if codec is not None:
        found["reconstructed"] = _accuracy(classifiers, store, rows, codec, seconds)
    return found


def _accuracy(
    classifiers: AttributeClassifiers, store: Store, rows: np.ndarray, codec: Autoencoder | None, seconds: float
) -> dict[str, Any]:
    results: list[dict[str, bool]] = []
    confusion: dict[str, dict[str, dict[str, int]]] = {name: {} for name in ATTRIBUTES}
    source = "true audio" if codec is None else f"{codec.kind} reconstruction"
    encoder = encoder_of(codec) if isinstance(codec, Codec) else None
    for row in tqdm(rows.tolist(), desc=f"held-out accuracy ({source})", unit="clip"):
        wav, annotations = window_of(store, row, seconds), annotations_of(store, row)
        if codec is not None:
            wav = reconstruct_with_codec(codec, wav, features.SAMPLE_RATE, encoder)
        prediction = classifiers.predict(wav, features.SAMPLE_RATE)[0]
        results.append(correct(prediction, annotations))
        for name, label in expected_labels(annotations).items():
            counts = confusion[name].setdefault(label, {})
            predicted = getattr(prediction, name)
            counts[predicted] = counts.get(predicted, 0) + 1
    means = {name: round(float(np.mean([result[name] for result in results])), 4) for name in results[0]}
    return {"n": len(results), **means, "confusion": confusion}
