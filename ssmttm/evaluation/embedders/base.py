"""Interfaces of embedders: audio to vectors; some also classify, or embed captions.

Shapes: B clips, S samples, W windows of a clip, D width of the embedding, N classes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ssmttm.errors import UserError


@runtime_checkable
class Embedder(Protocol):
    """Embeds mono audio."""

    name: str  # in `load_embedder`, such as "tiny" or "log_mel"
    fingerprint: str  # 16 characters: a hash over weights and all settings that change the embeddings, or a version
    sample_rate: int  # Hz of the input
    settings: Mapping[str, Any]  # what changes the embeddings beside the weights; also part of the fingerprint
    seconds: float  # length of the window of one embedding
    dim: int  # D

    def embed(self, wav: Tensor) -> Tensor:
        """Embeddings of each clip's windows: wav float32 [B, S] at `sample_rate` -> float32 [B, W, D]."""


@runtime_checkable
class Classifier(Protocol):
    """An embedder that also classifies."""

    classes: Sequence[str]

    def posteriors(self, wav: Tensor) -> Tensor:
        """Class probabilities of each clip, summing to 1: wav [B, S] -> float32 [B, N]."""


@runtime_checkable
class Scorer(Protocol):
    """An embedder whose D values are scores of their own, not a place in a space: only their means are reported."""

    axes: Sequence[str]  # the names of the scores; higher is better


@runtime_checkable
class JointEmbedder(Protocol):
    """An embedder of clips and captions in one joint space of width E, compared by cosine similarity."""

    def joint_audio(self, wav: Tensor) -> Tensor:
        """One embedding a clip: wav [B, S] -> float32 [B, E]."""

    def joint_text(self, captions: Sequence[str]) -> Tensor:
        """One embedding a caption: float32 [n, E]."""


def fingerprint(weights: str, settings: Mapping[str, Any]) -> str:
    """16 hex digits over a hash of the weights and the settings."""
    return hashlib.sha256(json.dumps([weights, settings], sort_keys=True).encode()).hexdigest()[:16]


def windows(wav: Tensor, size: int) -> Tensor:
    """Split clips into adjacent windows, dropping the remainder: [B, S] -> [B, W, size]."""
    if wav.shape[-1] < size:
        raise UserError(f"clips of {wav.shape[-1]} samples are shorter than the window of {size}: use longer clips")
    return wav.unfold(-1, size, size)
