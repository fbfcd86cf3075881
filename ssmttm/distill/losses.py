"""Distillation losses: divergences between softened distributions and distances between activations.

Forward and reverse KL at a temperature (Hinton et al., arXiv 1503.02531), skewed (DistiLLM, arXiv 2402.03898) or
bidirectional (TinyMusician, arXiv 2509.00914).
Shapes: V codes; n = V, or k + 1 for the top k codes and the rest as one; B batch, S positions, D and W widths.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.errors import UserError

DIVERGENCES = ("forward", "reverse", "bidirectional")
_MIN_LOG_P = -30.0


class SoftTarget(NamedTuple):
    """A teacher's distribution at a temperature."""

    log_p: Tensor  # [..., n], of all V codes, or of the codes `ids` and then of all others together
    ids: Tensor | None = None  # int64 [..., k], or None if all codes are kept

    def to(self, device: torch.device) -> "SoftTarget":
        return SoftTarget(self.log_p.to(device), None if self.ids is None else self.ids.to(device))


def soft_target(logits: Tensor, temperature: float = 1.0, k: int | None = None) -> SoftTarget:
    """The distribution of logits [..., V]; with k < V, of the top k codes and of the rest as one."""
    check_temperature(temperature)
    log_p = F.log_softmax(logits.float() / temperature, -1)
    n_codes = log_p.shape[-1]
    if k is None or k == n_codes:
        return SoftTarget(log_p)
    if not 1 <= k < n_codes:
        raise UserError(f"top-k must be in [1, {n_codes}], got k={k}")
    ids = log_p.topk(k, -1).indices
    return SoftTarget(_merge_rest(log_p, ids).clamp_min(_MIN_LOG_P), ids)


def student_log_probs(logits: Tensor, target: SoftTarget, temperature: float = 1.0) -> Tensor:
    """A student's log-probabilities of the codes that a target holds: logits [..., V] -> [..., n]."""
    log_q = F.log_softmax(logits.float() / temperature, -1)
    return log_q if target.ids is None else _merge_rest(log_q, target.ids)


def divergence(log_q: Tensor, log_p: Tensor, kind: str = "forward", skew: float = 0.0) -> Tensor:
    """Divergence of a student's distribution q from its teacher's p, in nats: [..., n] each -> [...].

        forward        KL(p, skew p + (1 - skew) q), mode-covering
        reverse        KL(q, skew q + (1 - skew) p), mode-seeking
        bidirectional  the mean of both

    A skew above 0 bounds the divergence and its gradient.
    """
    if kind not in DIVERGENCES:
        raise UserError(f"unknown distill.divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}")
    if not 0 <= skew < 1:
        raise UserError(f"distill.skew must be in [0, 1), got {skew}")
    forward, reverse = (log_p, log_q), (log_q, log_p)
    pairs = {"forward": [forward], "reverse": [reverse], "bidirectional": [forward, reverse]}[kind]
    return torch.stack([_kl(a, _mix(a, b, skew)) for a, b in pairs]).mean(0)


def divergence_sums(
    logits: Tensor,
    target: SoftTarget,
    valid: Tensor,
    temperature: float = 1.0,
    kind: str = "forward",
    skew: float = 0.0,
) -> Tensor:
    """Divergence of a student's logits [b, K, S, V] from a target, summed over valid positions [b, K, S]: [K]."""
    divergences = divergence(student_log_probs(logits, target, temperature), target.log_p, kind, skew)  # [b, K, S]
    return divergences.masked_fill(~valid, 0).sum((0, 2))


def hidden_state_distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """MSE of projected hidden states and the teacher's RMS-normalised ones: [B, S, W] each -> [B, S]."""
    return (projected - F.rms_norm(teacher, teacher.shape[-1:])).square().mean(-1)


def output_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each item's output relative to the teacher's energy: [B, S, D] each -> [B]."""
    return (student - teacher).square().sum((1, 2)) / teacher.square().sum((1, 2)).clamp_min(1e-12)


def check_temperature(temperature: float) -> None:
    """Raises UserError unless the temperature is finite and above 0."""
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise UserError(f"distill.temperature must be a number above 0, got {temperature}")


def _merge_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """Keep the codes `ids` and merge all others into one: [..., V] -> [..., k + 1]."""
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: Tensor, log_b: Tensor, skew: float) -> Tensor:
    """log(skew a + (1 - skew) b)."""
    if not skew:
        return log_b
    log_weights = log_a.new_tensor([skew, 1 - skew]).log()
    return torch.logaddexp(log_a + log_weights[0], log_b + log_weights[1])
