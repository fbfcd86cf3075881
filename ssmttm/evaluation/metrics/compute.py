"""Figures of a set of clips against a reference: every distance that an embedder allows, each with its fingerprint."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmttm.evaluation.embedders.base import Classifier, Embedder, JointEmbedder
from ssmttm.evaluation.metrics.bootstrap import kernel_statistic, manifold_statistic, weighted_bootstrap
from ssmttm.evaluation.metrics.distances import (
    FEWEST,
    NEIGHBOURS,
    PrecisionRecallCoverage,
    bootstrap,
    clap_score,
    class_divergence,
    frechet_distance,
    frechet_distance_infinity,
    frechet_distance_unchecked,
)
from ssmttm.evaluation.metrics.metric import Direction, Metric
from ssmttm.evaluation.protocol.embed_files import ClipEmbeddings, embed_clips, set_hash

_DRAWS = 100  # of a bootstrap


@dataclass(frozen=True)
class Clip:
    """What is judged: a file, the caption that it should sound like, and the true audio of that caption, if at hand."""

    path: Path
    caption: str
    reference: Path | None = None


def score(
    clips: Sequence[Clip],
    references: Sequence[Path],
    embedder: Embedder,
    seconds: float,
    decoding: Mapping[str, Any],
    cache: Path,
) -> list[Metric]:
    """All figures that one embedder gives.

    fad, fad_infinity, kad, precision, recall and coverage against the set of references; kl against each clip's own
    reference, if every clip has one and the embedder names classes; clap, if it reads captions.

    Args:
        clips: n of them.
        references: m files of real music.
        seconds: how much of each file, from its start.
        decoding: how the clips were sampled, for the fingerprint.
        cache: folder of what was heard before.

    Raises:
        UserError: too few clips, or a file that cannot be read.
    """
    embeddings = embed_clips(embedder, [clip.path for clip in clips], seconds, cache)
    facts = {
        "embedder": embedder.name,
        "weights": embedder.fingerprint,
        "sample_rate": embedder.sample_rate,
        "channels": "mean of all",
        "level": "as it is",
        "window_seconds": embedder.seconds,
        "clip_seconds": seconds,
        "n": len(clips),
        "prompts": _hash(sorted(clip.caption for clip in clips)),
        **decoding,
    }
    metrics: list[Metric] = []

    def add(name: str, value: float, interval: tuple[float, float], better: Direction, **more: Any) -> None:
        metrics.append(Metric(f"{name}_{embedder.name}", value, *interval, better, {**facts, **more}))

    if references:
        reference = embed_clips(embedder, references, seconds, cache)
        against = {"n_reference": len(references), "reference": set_hash(references)}
        for name, value, interval, better in set_distances(embeddings, reference):
            add(name, value, interval, better, **against)
    pairs = [clip.reference for clip in clips if clip.reference is not None]
    if isinstance(embedder, Classifier) and len(pairs) == len(clips):
        truth = embed_clips(embedder, pairs, seconds, cache)
        each = class_divergence(embeddings.posteriors, truth.posteriors)
        add("kl", *_mean(each), "lower", n_reference=len(pairs), reference=set_hash(pairs))
    if isinstance(embedder, JointEmbedder):
        words = embedder.joint_text([clip.caption for clip in clips])
        add("clap", *_mean(clap_score(embeddings.joint, words)), "higher")
    return metrics


def set_distances(embeddings: ClipEmbeddings, reference: ClipEmbeddings) -> list[tuple[str, float, tuple[float, float], Direction]]:
    """Name, value, interval and direction of each distance between sets. Clips are drawn, not windows."""
    x, y = embeddings.rows().double(), reference.rows().double()
    sets = embeddings.vectors.double(), reference.vectors.double()
    counts = len(sets[0]), len(sets[1])
    fad = bootstrap(
        lambda a, b: frechet_distance_unchecked(a.flatten(0, 1), b.flatten(0, 1)),
        *sets,
        draws=_DRAWS,
        title="interval of fad",
    )
    (kad,) = weighted_bootstrap(kernel_statistic(*sets), *counts, _DRAWS, title="interval of kad")
    found: list[tuple[str, float, tuple[float, float], Direction]] = [
        ("fad", frechet_distance(x, y), fad, "lower"),
        ("kad", kad.value, (kad.low, kad.high), "lower"),
    ]
    if len(x) >= FEWEST:
        value, low, high = frechet_distance_infinity(x, y)
        found.append(("fad_infinity", value, (low, high), "lower"))
    if min(len(x), len(y)) > NEIGHBOURS:
        shares = weighted_bootstrap(manifold_statistic(*sets), *counts, _DRAWS, title="of neighbourhoods")
        for name, (value, low, high) in zip(PrecisionRecallCoverage._fields, shares, strict=True):
            found.append((name, value, (max(0.0, low), min(1.0, high)), "higher"))
    return found


def _mean(each: Tensor) -> tuple[float, tuple[float, float]]:
    """Mean over clips, and its bootstrap interval."""
    return float(each.mean()), bootstrap(lambda rows: float(rows.mean()), each, draws=1_000)


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
