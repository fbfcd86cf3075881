"""How often the detectors are right on held-out music, heard as it is and through a codec."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import Codec, encoder_of
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


def reconstruct_with_codec(codec: Codec, wav: Tensor, sample_rate: int, encoder: Codec | None = None) -> Tensor:
    """Encode (with `encoder` if that is another) and decode mono audio; wav [1, S] at `sample_rate` -> [1, S]."""
    coded = audio.resample(wav, sample_rate, codec.sample_rate)
    with torch.inference_mode():
        decoded = codec.decode((encoder or codec).encode(coded[None]))[0]
    back = audio.resample(decoded.clone(), codec.sample_rate, sample_rate)
    return back[:, : wav.shape[-1]]


def window_of(store: Store, row: int, seconds: float = WINDOW) -> Tensor:
    """A window of a segment's audio at the features' rate, its place fixed by the row. [1, S]."""
    wav, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
    size = int(seconds * features.SAMPLE_RATE)
    start = int(np.random.default_rng(row).integers(max(0, wav.shape[-1] - size) + 1))
    return wav[:, start : start + size]


def truth_of(store: Store, row: int) -> dict[str, Any]:
    """A segment's ground truth. Raises UserError if it has none."""
    truth = store.truth(row)
    if truth is None:
        raise UserError(f"{store.path} has no ground truth: prepare the built-in corpus, and measure on that")
    return truth


def expected_of(truth: dict[str, Any]) -> dict[str, str]:
    """What the detectors should answer for each of ATTRIBUTES, from a segment's ground truth."""
    return {"family": truth["lead"]["family"], "tempo_class": tempo_class(truth["bpm"]), "mode": truth["mode"]}


def agreement(detection: AttributePrediction, truth: dict[str, Any]) -> dict[str, bool]:
    """Which of a piece's true attributes were heard; the tempo itself may be off by 4 %."""
    tonic = pitch_class(detection.key) == pitch_class(truth["key"])
    return {
        **{name: getattr(detection, name) == expected for name, expected in expected_of(truth).items()},
        "third": detection.third == third(truth["mode"]),
        "tonic": tonic,
        "key_and_mode": tonic and detection.mode == truth["mode"],
        "bpm_within_4_percent": abs(detection.bpm / truth["bpm"] - 1) <= 0.04,
    }


def accuracy(
    classifiers: AttributeClassifiers, store: Store, rows: np.ndarray, codec: Codec | None = None, seconds: float = WINDOW
) -> dict[str, Any]:
    """Share of right answers over one window of each row.

    Returns:
        `true`, and `reconstructed` if there is a codec: each with `n`, a share for every key of `agreement`, and
        `confusion`, a table {attribute: {truth: {answer: count}}}.
    """
    hearings = {"true": None} if codec is None else {"true": None, "reconstructed": codec}
    return {name: _accuracy(classifiers, store, rows, hearing, seconds) for name, hearing in hearings.items()}


def _accuracy(
    classifiers: AttributeClassifiers, store: Store, rows: np.ndarray, codec: Codec | None, seconds: float
) -> dict[str, Any]:
    right: list[dict[str, bool]] = []
    confusion: dict[str, dict[str, dict[str, int]]] = {name: {} for name in ATTRIBUTES}
    embeddings, encoder = ("true audio", None) if codec is None else ("through the codec", encoder_of(codec))
    for row in tqdm(rows.tolist(), desc=f"held-out accuracy ({embeddings})", unit="clip"):
        wav, truth = window_of(store, row, seconds), truth_of(store, row)
        if codec is not None:
            wav = reconstruct_with_codec(codec, wav, features.SAMPLE_RATE, encoder)
        detection = classifiers.predict(wav, features.SAMPLE_RATE)[0]
        right.append(agreement(detection, truth))
        for name, expected in expected_of(truth).items():
            counts = confusion[name].setdefault(expected, {})
            answer = getattr(detection, name)
            counts[answer] = counts.get(answer, 0) + 1
    shares = {name: round(float(np.mean([row[name] for row in right])), 4) for name in right[0]}
    return {"n": len(right), **shares, "confusion": confusion}
