"""What the distribution metrics ask of an embedder: audio in, vectors out; some also name classes or read text.

Shapes: B clips, S samples, W windows of a clip, D width of the embedding, N classes.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


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
class TextEmbedder(Protocol):
    """An embedder whose space holds captions too."""

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """One vector a caption, to be compared with clips by cosine: float32 [n, D]."""
