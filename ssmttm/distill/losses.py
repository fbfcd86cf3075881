"""What a student is asked to share with its teacher: the distribution of every code, the streams between its blocks.

Divergences of distributions softened by a temperature (Hinton et al., arXiv 1503.02531), forward and reverse, skewed
(DistiLLM, arXiv 2402.03898) and both ways (as TinyMusician has it, arXiv 2509.00914).
Shapes: ... any, V codes, k of them kept, n = V, or k + 1 with the rest as one; B batch, S positions, D and W widths.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.errors import UserError

DIVERGENCES = ("forward", "reverse", "bidirectional")
_LEAST = -30.0  # of the log-probability of what a teacher holds for all but impossible


class Target(NamedTuple):
    """A teacher's distribution at a temperature.

    Attributes:
        log_p: [..., n]. Without ids, of all V codes; with ids, of those, then of all other codes together.
        ids: int64 [..., k].
    """

    log_p: Tensor
    ids: Tensor | None = None


def target(logits: Tensor, temperature: float = 1.0, k: int | None = None) -> Target:
    """The distribution of logits [..., V]; with k < V, of the k likeliest codes and of the rest as one.

    Raises:
        UserError: the temperature is not above 0, or k not from 1 to V.
    """
    check_temperature(temperature)
    log_p = F.log_softmax(logits.float() / temperature, -1)
    if k is None or k == log_p.shape[-1]:
        return Target(log_p)
    if not 1 <= k < log_p.shape[-1]:
        raise UserError(f"k={k} codes of a distribution of {log_p.shape[-1]} cannot be kept: give 1 to as many")
    ids = log_p.topk(k, -1).indices
    return Target(_folded(log_p, ids).clamp_min(_LEAST), ids)


def student_log_q(logits: Tensor, target: Target, temperature: float = 1.0) -> Tensor:
    """A student's log-probabilities of what a target's are of: logits [..., V] -> [..., n]."""
    log_q = F.log_softmax(logits.float() / temperature, -1)
    return log_q if target.ids is None else _folded(log_q, target.ids)


def divergence(log_q: Tensor, log_p: Tensor, kind: str = "forward", skew: float = 0.0) -> Tensor:
    """How far a student's distribution q is from its teacher's p, in nats.

        forward        KL(p, q'), q' = skew p + (1 - skew) q: cover all that the teacher holds for possible
        reverse        KL(q, p'), p' = skew q + (1 - skew) p: stay within what it holds for likely
        bidirectional  the mean of both

    Args:
        log_q, log_p: [..., n].
        skew: in [0, 1); a little of it bounds the divergence and its gradient.

    Returns:
        [...].

    Raises:
        UserError: no such kind, or a skew out of range.
    """
    if kind not in DIVERGENCES:
        raise UserError(f"unknown distill.divergence {kind!r}: choose from {', '.join(DIVERGENCES)}")
    if not 0 <= skew < 1:
        raise UserError(f"distill.skew={skew} is out of range: give 0 to below 1")
    forward, reverse = (log_p, log_q), (log_q, log_p)
    pairs = {"forward": [forward], "reverse": [reverse], "bidirectional": [forward, reverse]}[kind]
    return torch.stack([_kl(a, _mixed(a, b, skew)) for a, b in pairs]).mean(0)


def hidden_state_distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean square between a student's projected stream and its teacher's of unit size: [B, S, W] each -> [B, S]."""
    return (projected - F.rms_norm(teacher, teacher.shape[-1:])).square().mean(-1)


def output_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Square error of a layer's output as a share of its teacher's energy, item by item: [B, S, D] each -> [B]."""
    return (student - teacher).square().sum((1, 2)) / teacher.square().sum((1, 2)).clamp_min(1e-12)


def check_temperature(temperature: float) -> None:
    """Raises UserError unless it is a number above 0."""
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise UserError(f"distill.temperature={temperature}: give a number above 0 (1 leaves the teacher as it is)")


def _folded(log_p: Tensor, ids: Tensor) -> Tensor:
    """[..., V] -> [..., k + 1]: those of ids, and all others together."""
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), others], -1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixed(log_a: Tensor, log_b: Tensor, skew: float) -> Tensor:
    """log(skew a + (1 - skew) b)."""
    if not skew:
        return log_b
    parts = log_a.new_tensor([skew, 1 - skew]).log()
    return torch.logaddexp(log_a + parts[0], log_b + parts[1])
