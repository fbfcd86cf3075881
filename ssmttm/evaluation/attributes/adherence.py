"""Does the music follow the prompt? Held-out captions and the pieces made of them, heard by the detectors.

For lead family, tempo class and mode: how often the detectors hear what the prompt asked for, what chance would give,
the same with prompts and music shuffled against one another, and how often the detectors are right on true music.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio.features import SAMPLE_RATE
from ssmttm.codecs import Codec
from ssmttm.data.store import Store
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, accuracy, window_of
from ssmttm.evaluation.attributes.classifiers import (
    MODES,
    TEMPO_CLASSES,
    AttributeClassifiers,
    AttributePrediction,
    third,
)
from ssmttm.evaluation.metrics.statistics import Agreement, agreement_of
from ssmttm.evaluation.music.audio_checks import AudioCheck, check_audio, spectral_flatness
from ssmttm.evaluation.protocol.balanced_prompts import Prompt

_NAMES = {"family": "lead family", "tempo_class": "tempo class", "mode": "mode", "third": "major or minor third"}
_TITLES = ("attribute", "agreement", "95 % interval", "chance (uniform / majority)", "p", "shuffled", "p (shuffled)")


@dataclass(frozen=True)
class AdherenceReport:
    """The figures of one evaluation.

    Attributes:
        agreement: by attribute (family, tempo_class, mode, third).
        classifier_accuracy: `accuracy` of the detectors on the same store's held-out audio, `true` and `reconstructed`.
        checks: how many of the generated pieces were silent, clipped, noisy or not finite.
        fingerprint: what the figures depend on: model, codec, detectors, store, seed, n, duration, guidance scale.
        pieces: each prompt with its seed, what was expected and what was heard.
    """

    agreement: dict[str, Agreement]
    classifier_accuracy: dict[str, dict[str, Any]]
    checks: dict[str, int]
    fingerprint: dict[str, Any]
    pieces: list[dict[str, Any]]

    def table(self) -> str:
        """The figures as Markdown."""
        hearings = list(self.classifier_accuracy)
        titles = [*_TITLES, *(f"detector right on {name} audio" for name in hearings)]
        lines = [titles, ["---"] * len(titles)]
        for name, a in self.agreement.items():
            rights = [f"{100 * self.classifier_accuracy[hearing][name]:.1f} %" for hearing in hearings]
            cells = [f"{100 * a.share:.1f} %", f"{100 * a.low:.0f} to {100 * a.high:.0f} %"]
            cells += [f"{100 * a.uniform:.1f} / {100 * a.majority:.1f} %", f"{a.p_value:.2g}"]
            lines.append([_NAMES[name], *cells, f"{100 * a.shuffled:.1f} %", f"{a.shuffled_p:.2g}", *rights])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        counts = ", ".join(f"{name} {table_['n']} windows" for name, table_ in self.classifier_accuracy.items())
        checks = ", ".join(f"{count} {name}" for name, count in self.checks.items())
        facts = ", ".join(f"{name} {value}" for name, value in self.fingerprint.items())
        return f"{table}\n\nGenerated pieces: {checks}. AttributeClassifiers heard: {counts}.\nMeasured with: {facts}."

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def measure_adherence(
    store: Store,
    prompts: Sequence[Prompt],
    pieces: Sequence[Path],
    codec: Codec,
    facts: Mapping[str, Any],
    seed: int = 0,
    classifiers: AttributeClassifiers | None = None,
) -> AdherenceReport:
    """Measure how well pieces follow the held-out prompts of a built-in store.

    Args:
        store: a built-in store that keeps its audio; the detectors' accuracy is taken on its valid and test splits, on
            true audio and through the codec.
        prompts: of the store.
        pieces: an audio file of 4 s or more for each prompt.
        codec: what the pieces came through.
        facts: what the pieces depend on, for the fingerprint: model, decoding.
        seed: of the shuffled control.
        detectors: default: the embedded ones.

    Raises:
        UserError: the store has no ground truth or audio, or a piece cannot be read.
    """
    classifiers = classifiers or AttributeClassifiers.from_pretrained()
    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    classifier_accuracy = accuracy(classifiers, store, held_out, codec)
    reference = music_flatness(store, held_out)
    detections: list[AttributePrediction] = []
    checks: list[AudioCheck] = []
    for path in tqdm(pieces, desc="detecting", unit="piece"):
        wav, rate = audio.read(path)
        checks.append(check_audio(wav[0], rate, reference))
        detections += classifiers.predict(wav, rate)
    return AdherenceReport(
        agreement=_agreements(prompts, detections, len(classifiers.families), seed),
        classifier_accuracy=classifier_accuracy,
        checks={name: sum(getattr(check, name) for check in checks) for name in ("good", "silent", "clipped", "noisy")},
        fingerprint={
            **facts,
            "codec": codec.fingerprint,
            "classifiers": classifiers.fingerprint,
            "store": store.fingerprint,
            "n": len(prompts),
        },
        pieces=[
            {
                "caption": prompt.caption,
                "id": store.ids(np.array([prompt.row]))[0],
                "expected": prompt.expected,
                "embeddings": {name: getattr(detection, name) for name in (*ATTRIBUTES, "bpm", "key")},
            }
            for prompt, detection in zip(prompts, detections, strict=True)
        ],
    )


def music_flatness(store: Store, rows: np.ndarray, most: int = 50) -> float:
    """The spectral flatness that 95 % of windows of up to `most` rows stay under: what `check_audio` compares with."""
    bar = tqdm(rows[:most].tolist(), desc="flatness of music", unit="clip")
    return float(np.quantile([spectral_flatness(window_of(store, row), SAMPLE_RATE) for row in bar], 0.95))


def _agreements(
    prompts: Sequence[Prompt], detections: Sequence[AttributePrediction], n_families: int, seed: int
) -> dict[str, Agreement]:
    """Agreement by attribute; the third is derived from the mode."""
    sizes = {"family": n_families, "tempo_class": len(TEMPO_CLASSES), "mode": len(MODES)}
    found = {
        name: agreement_of([p.expected[name] for p in prompts], [getattr(d, name) for d in detections], size, seed)
        for name, size in sizes.items()
    }
    thirds = [third(p.expected["mode"]) for p in prompts]
    return {**found, "third": agreement_of(thirds, [d.third for d in detections], 2, seed)}
