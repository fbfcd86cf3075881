"""All metrics of a set of clips that one embedder allows, each with the settings it depends on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmttm.evaluation.embedders.base import Classifier, Embedder, JointEmbedder, Scorer
from ssmttm.evaluation.metrics.bootstrap import Interval, bootstrap
from ssmttm.evaluation.metrics.clap_score import clap_score
from ssmttm.evaluation.metrics.frechet import (
    MIN_EXTRAPOLATED,
    frechet_distance,
    frechet_distance_infinity,
    frechet_statistic,
)
from ssmttm.evaluation.metrics.kernel import kernel_statistic
from ssmttm.evaluation.metrics.kl import kl_divergence
from ssmttm.evaluation.metrics.mauve import mauve_statistic
from ssmttm.evaluation.metrics.metric import Direction, Metric
from ssmttm.evaluation.metrics.prdc import NEIGHBOURS, PrecisionRecallCoverage, prdc_statistic
from ssmttm.evaluation.protocol.embed_files import ClipEmbeddings, embed_clips, set_hash

Measured = tuple[str, Interval, Direction]


@dataclass(frozen=True)
class Clip:
    """An audio file to evaluate, its caption, and the caption's reference audio and concepts, if there are any."""

    path: Path
    caption: str
    reference: Path | None = None
    concepts: tuple[str, ...] = ()


def compute_metrics(
    clips: Sequence[Clip],
    references: Sequence[Path],
    embedder: Embedder,
    seconds: float,
    decoding: Mapping[str, Any],
    cache: Path,
) -> list[Metric]:
    """All metrics of one embedder.

    fad, fad_infinity, kad, mad, precision, recall and coverage against the references; kl against each clip's own
    reference, if every clip has one and the embedder classifies; clap, if it embeds captions. Of a Scorer only the mean
    of each score. The first `seconds` of each file are used; `decoding`, the sampling settings of the clips, is part of
    the fingerprint.
    """
    embeddings = embed_clips(embedder, [clip.path for clip in clips], seconds, cache)
    fingerprint = {
        "embedder": embedder.name,
        "weights": embedder.fingerprint,
        **embedder.settings,
        "sample_rate": embedder.sample_rate,
        "channels": "mean of all",
        "level": "unchanged",
        "window_seconds": embedder.seconds,
        "clip_seconds": seconds,
        "n": len(clips),
        "prompts": text_hash(sorted(clip.caption for clip in clips)),
        **decoding,
    }
    metrics: list[Metric] = []

    def add(measured: Measured, reference: Sequence[Path] = ()) -> None:
        name, interval, better = measured
        against = {"n_reference": len(reference), "reference": set_hash(reference)} if reference else {}
        metrics.append(Metric(f"{name}_{embedder.name}", *interval, better, {**fingerprint, **against}))

    if isinstance(embedder, Scorer):
        for axis, scores in zip(embedder.axes, embeddings.vectors.mean(1).T, strict=True):  # D x [n]
            add((axis, _mean(scores), "higher"))
        return metrics
    if references:
        for measured in set_distances(embeddings, embed_clips(embedder, references, seconds, cache)):
            add(measured, references)
    paired = [clip.reference for clip in clips if clip.reference is not None]
    if isinstance(embedder, Classifier) and len(paired) == len(clips):
        reference = embed_clips(embedder, paired, seconds, cache)
        add(("kl", _mean(kl_divergence(embeddings.posteriors, reference.posteriors)), "lower"), paired)
    if isinstance(embedder, JointEmbedder):
        captions = embedder.joint_text([clip.caption for clip in clips])
        add(("clap", _mean(clap_score(embeddings.joint, captions)), "higher"))
    return metrics


def set_distances(embeddings: ClipEmbeddings, reference: ClipEmbeddings) -> list[Measured]:
    """Name, value with interval, and direction of each distance between two sets. Clips are resampled, not windows."""
    x, y = embeddings.vectors.double(), reference.vectors.double()  # [n, W, D], [m, V, D]
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)
    (fad,) = bootstrap(frechet_statistic(x, y), len(x), len(y), title="interval of fad")
    (kad,) = bootstrap(kernel_statistic(x, y), len(x), len(y), title="interval of kad")
    fad = fad._replace(value=frechet_distance(rows_x, rows_y))  # checks its input and warns of few samples
    (mad,) = bootstrap(mauve_statistic(x, y), len(x), len(y), title="interval of mad")
    distances: list[Measured] = [("fad", fad, "lower"), ("kad", kad, "lower"), ("mad", mad, "lower")]
    if len(rows_x) >= MIN_EXTRAPOLATED:
        distances.append(("fad_infinity", frechet_distance_infinity(rows_x, rows_y), "lower"))
    if min(len(rows_x), len(rows_y)) > NEIGHBOURS:
        prdc = bootstrap(prdc_statistic(x, y), len(x), len(y), title="interval of prdc")
        for name, (value, low, high) in zip(PrecisionRecallCoverage._fields, prdc, strict=True):
            distances.append((name, Interval(value, max(0.0, low), min(1.0, high)), "higher"))
    return distances


def _mean(values: Tensor) -> Interval:
    """Mean over clips [n], with its interval."""
    values = values.double()
    (interval,) = bootstrap(lambda weights: [float(weights @ values) / len(values)], len(values), draws=1_000)
    return interval


def text_hash(texts: Sequence[str]) -> str:
    """16 hex digits over some texts, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
