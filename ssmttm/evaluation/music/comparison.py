"""Distributions of the music metrics of several sets of clips against those of a reference set, such as true music."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssmttm.evaluation.music.music_metrics import FolderMetrics

MUSICAL = (
    "beat_variation",
    "onset_density",
    "key_clarity",
    "chroma_entropy",
    "repeated",
    "bar_similarity",
    "phrase_similarity",
    "silent",
    "clicks",
    "loudness",
)  # metrics that separate music from single notes, and the loudness


@dataclass(frozen=True)
class Difference:
    """One metric of a set of clips against the reference."""

    mean: float
    reference: float  # its mean over the reference
    relative: float  # (mean - reference) / |reference|; NaN where the reference's mean is 0
    distance: float  # Wasserstein-1 distance of the two distributions, in standard deviations of the reference


def differences(
    reference: FolderMetrics, clips: FolderMetrics, names: Sequence[str] = MUSICAL
) -> dict[str, Difference]:
    """The difference of each metric that is defined for a clip or more of both sets."""
    from scipy.stats import wasserstein_distance

    found = {}
    for name in names:
        true, other = _values(reference, name), _values(clips, name)
        if len(true) == 0 or len(other) == 0:
            continue
        mean, expected = float(other.mean()), float(true.mean())
        relative = (mean - expected) / abs(expected) if expected else float("nan")
        spread = float(true.std()) or float("nan")
        found[name] = Difference(mean, expected, relative, float(wasserstein_distance(true, other)) / spread)
    return found


def comparison_table(reference: str, sets: Mapping[str, FolderMetrics]) -> list[list[str]]:
    """Means of all sets; beside each but the reference, its relative difference and its distance from the reference."""
    others = [name for name in sets if name != reference]
    found = {name: differences(sets[reference], sets[name]) for name in others}
    rows = [["mean", reference, *(title for name in others for title in (name, "difference", "distance"))]]
    for metric in MUSICAL:
        if not any(metric in by_metric for by_metric in found.values()):
            continue
        row = [metric, f"{_values(sets[reference], metric).mean():.4g}"]
        for name in others:
            one = found[name].get(metric)
            row += [f"{one.mean:.4g}", _change(metric, one), _number(one.distance)] if one else ["", "", ""]
        rows.append(row)
    return rows


def _change(metric: str, one: Difference) -> str:
    """The difference of the means: of a level in LU, otherwise relative; empty where the reference's mean is 0."""
    if metric == "loudness":
        return f"{one.mean - one.reference:+.1f} LU"
    return "" if np.isnan(one.relative) else f"{100 * one.relative:+.0f} %"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _values(clips: FolderMetrics, name: str) -> np.ndarray:
    values = np.array([getattr(clip, name) for clip in clips.clips.values()], dtype=float)
    return values[np.isfinite(values)]
