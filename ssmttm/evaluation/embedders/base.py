"""What the distribution metrics ask of an embedder: audio in, vectors out; some also name classes, or read captions.

Shapes: B clips, S samples, W windows of a clip, D width of the embedding, N classes.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ssmttm.errors import UserError


@runtime_checkable
class Embedder(Protocol):
    """Turns mono audio into vectors.

    Attributes:
        name: as `load_embedder` knows it, such as "tiny" or "log_mel".
        fingerprint: 16 hex digits over the weights and every setting that changes a vector.
        sample_rate: Hz of the audio that it takes.
        seconds: length of the window that one vector stands for; a clip of at least one such window gives one or more.
        dim: D.
    """

    name: str
    fingerprint: str
    sample_rate: int
    seconds: float
    dim: int

    def embed(self, wav: Tensor) -> Tensor:
        """Vectors of each clip, window by window: wav float32 [B, S] at `sample_rate` -> float32 [B, W, D].

        Raises:
            UserError: a clip is shorter than one window.
        """


@runtime_checkable
class Classifier(Protocol):
    """An embedder that also says what it hears.

    Attributes:
        classes: the N names.
    """

    classes: Sequence[str]

    def posteriors(self, wav: Tensor) -> Tensor:
        """A distribution over the classes for each clip, rows summing to 1: wav [B, S] -> float32 [B, N]."""


@runtime_checkable
class JointEmbedder(Protocol):
    """An embedder that also brings clips and captions into one space, to be compared by cosine there.

    E is the width of that space.
    """

    def joint_audio(self, wav: Tensor) -> Tensor:
        """One vector a clip: wav [B, S] -> float32 [B, E]."""

    def joint_text(self, captions: Sequence[str]) -> Tensor:
        """One vector a caption: float32 [n, E]."""


def windows(wav: Tensor, size: int) -> Tensor:
    """Cut clips into windows side by side, leaving out a rest: [B, S] -> [B, W, size].

    Raises:
        UserError: the clips are shorter than one window.
    """
    if wav.shape[-1] < size:
        raise UserError(f"clips of {wav.shape[-1]} samples are shorter than the window of {size}: give longer ones")
    return wav.unfold(-1, size, size)
