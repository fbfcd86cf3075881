"""CLAP score: cosine similarity of audio and caption embeddings (CLAP, arXiv 2211.06687)."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.inputs import check_matrix


def clap_score(audio: ArrayLike | Tensor, text: ArrayLike | Tensor) -> Tensor:
    """Cosine similarity of joint embeddings [n, d] of clips and their captions: [n]."""
    a, t = check_matrix(audio, "the audio embeddings"), check_matrix(text, "the text embeddings")
    if a.shape != t.shape:
        raise UserError(f"clips {list(a.shape)} cannot be paired with captions {list(t.shape)}: give one row a prompt")
    return torch.nn.functional.cosine_similarity(a, t, dim=1)
