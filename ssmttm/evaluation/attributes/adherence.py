"""Prompt adherence: attribute classifiers on clips generated from held-out captions.

For lead family, tempo class and mode: the accuracy of the prompted attributes, chance, the accuracy with shuffled
prompts, and the classifiers' own accuracy on true music.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio.features import SAMPLE_RATE
from ssmttm.codecs import Autoencoder
from ssmttm.data.store import Store
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, accuracy, window_of
from ssmttm.evaluation.attributes.classifiers import MODES, TEMPO_CLASSES, AttributeClassifiers, third
from ssmttm.evaluation.metrics.statistics import LabelAccuracy, label_accuracy
from ssmttm.evaluation.music.audio_checks import check_audio, spectral_flatness
from ssmttm.evaluation.protocol.balanced_prompts import Prompt
from ssmttm.reports.tables import Section

_NAMES = {"family": "lead family", "tempo_class": "tempo class", "mode": "mode", "third": "major or minor third"}
_TITLES = ("attribute", "accuracy", "95 % interval", "chance (uniform / majority)", "p", "shuffled", "p (shuffled)")


@dataclass(frozen=True)
class AdherenceReport:
    """Prompt adherence of a set of clips."""

    accuracy: dict[str, LabelAccuracy]  # by attribute: family, tempo_class, mode, third
    classifier_accuracy: dict[str, dict[str, Any]]  # on the store's held-out audio, `true` and `reconstructed`
    checks: dict[str, int]  # number of good, silent, clipped and noisy clips
    fingerprint: dict[str, Any]  # model, its codec or VAE, classifiers, store, seed, n, decoding
    clips: list[dict[str, Any]]  # caption, expected and predicted labels

    def section(self) -> Section:
        """The results as a table with notes."""
        sources = list(self.classifier_accuracy)
        rows = [[*_TITLES, *(f"classifier accuracy, {source} audio" for source in sources)]]
        for name, a in self.accuracy.items():
            row = [_NAMES[name], f"{100 * a.accuracy:.1f} %", f"{100 * a.low:.0f} to {100 * a.high:.0f} %"]
            row += [f"{100 * a.uniform:.1f} / {100 * a.majority:.1f} %", f"{a.p_value:.2g}"]
            row += [f"{100 * a.shuffled:.1f} %", f"{a.shuffled_p:.2g}"]
            rows.append([*row, *(f"{100 * self.classifier_accuracy[source][name]:.1f} %" for source in sources)])
        counts = ", ".join(f"{table['n']} windows of {name} audio" for name, table in self.classifier_accuracy.items())
        checks = ", ".join(f"{count} {name}" for name, count in self.checks.items())
        settings = ", ".join(f"{name} {value}" for name, value in self.fingerprint.items())
        notes = f"Generated clips: {checks}. Classifier accuracy: {counts}.\nSettings: {settings}."
        return Section("Prompt adherence", notes, rows)


def measure_adherence(
    store: Store,
    prompts: Sequence[Prompt],
    paths: Sequence[Path],
    decoder: Autoencoder,
    settings: Mapping[str, Any],
    seed: int = 0,
    classifiers: AttributeClassifiers | None = None,
) -> AdherenceReport:
    """Measure how well clips, an audio file of 4 s or more for each prompt, follow the held-out prompts of a store.

    The classifiers' own accuracy is measured on the store's valid and test splits, also after reconstruction by
    `decoder`, the codec or VAE that decodes the model's clips. `settings`, of model and decoding, are part of the
    fingerprint.
    """
    classifiers = classifiers or AttributeClassifiers.from_pretrained()
    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    classifier_accuracy = accuracy(classifiers, store, held_out, decoder)
    reference = music_flatness(store, held_out)
    predictions, checks = [], []
    for path in tqdm(paths, desc="classifying", unit="clip"):
        wav, rate = audio.read(path)
        checks.append(check_audio(wav[0], rate, reference))
        predictions += classifiers.predict(wav, rate)
    classes = {"family": len(classifiers.families), "tempo_class": len(TEMPO_CLASSES), "mode": len(MODES)}
    accuracies = {}
    for name, n_classes in classes.items():
        predicted = [getattr(prediction, name) for prediction in predictions]
        accuracies[name] = label_accuracy([prompt.expected[name] for prompt in prompts], predicted, n_classes, seed)
    thirds = [third(prompt.expected["mode"]) for prompt in prompts]
    accuracies["third"] = label_accuracy(thirds, [prediction.third for prediction in predictions], 2, seed)
    return AdherenceReport(
        accuracy=accuracies,
        classifier_accuracy=classifier_accuracy,
        checks={name: sum(getattr(check, name) for check in checks) for name in ("good", "silent", "clipped", "noisy")},
        fingerprint={
            **settings,
            decoder.kind: decoder.fingerprint,
            "classifiers": classifiers.fingerprint,
            "store": store.fingerprint,
            "n": len(prompts),
        },
        clips=[
            {
                "caption": prompt.caption,
                "id": store.ids(np.array([prompt.row]))[0],
                "expected": prompt.expected,
                "predicted": {name: getattr(prediction, name) for name in (*ATTRIBUTES, "bpm", "key")},
            }
            for prompt, prediction in zip(prompts, predictions, strict=True)
        ],
    )


def music_flatness(store: Store, rows: np.ndarray, max_rows: int = 50) -> float:
    """The 95 % quantile of spectral flatness over windows of up to `max_rows` rows, the reference of `check_audio`."""
    bar = tqdm(rows[:max_rows].tolist(), desc="flatness of music", unit="clip")
    return float(np.quantile([spectral_flatness(window_of(store, row), SAMPLE_RATE) for row in bar], 0.95))
