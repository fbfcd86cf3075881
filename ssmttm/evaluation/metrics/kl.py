"""KL divergence of class posteriors, as audio generation is evaluated since AudioGen (arXiv 2209.15352)."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.inputs import check_matrix

_MIN_PROBABILITY = 1e-6


def kl_divergence(generated: ArrayLike | Tensor, reference: ArrayLike | Tensor) -> Tensor:
    """KL(reference || generated) of each clip in nats: [n].

    Probabilities are clamped to at least 1e-6 and renormalised. Posteriors are [n, N], row i of both of one prompt.
    """
    p, q = check_matrix(reference, "the reference posteriors"), check_matrix(generated, "the generated posteriors")
    if p.shape != q.shape:
        raise UserError(f"posteriors {list(q.shape)} cannot be paired with {list(p.shape)}: give one row a prompt each")
    for rows in (p, q):
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones(len(rows)).double(), atol=1e-3):
            raise UserError("posteriors must be at least 0 and sum to 1 in every row: apply a softmax first")
    p, q = p.clamp_min(_MIN_PROBABILITY), q.clamp_min(_MIN_PROBABILITY)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p.log() - q.log())).sum(1)
