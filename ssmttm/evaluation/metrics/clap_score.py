"""CLAP score: cosine similarity of audio and caption embeddings (CLAP, arXiv 2211.06687)."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.inputs import check_matrix


def clap_score(audio: ArrayLike | Tensor, text: ArrayLike | Tensor) -> Tensor:
    """Cosine similarity of each clip and its caption: [n].

    Args:
        audio, text: joint embeddings [n, d]; row i of both belongs to one prompt.

    Raises:
        UserError: different shapes, NaN or infinity.
    """
    a, t = check_matrix(audio, "the audio embeddings"), check_matrix(text, "the text embeddings")
    if a.shape != t.shape:
        raise UserError(f"clips {list(a.shape)} cannot be paired with captions {list(t.shape)}: give one row a prompt")
    return torch.nn.functional.cosine_similarity(a, t, dim=1)
