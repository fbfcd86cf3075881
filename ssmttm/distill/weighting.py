"""How much each loss counts, when several are to be learnt from: fixed, or found while training.

    static       the given weights
    magnitude    each divided by how large that loss has been lately: all count alike, times their weights
    gradient     each divided by how large its gradient, at the codes' embedding, has been lately (after the balancer of
                 arXiv 2210.13438, which looks at the output)
    uncertainty  learnt: exp(-s) loss / 2 + s / 2 by loss (arXiv 1705.07115), times their weights

Shapes: n losses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError

WEIGHTINGS = ("static", "magnitude", "gradient", "uncertainty")
_KEPT = 0.9  # of a running mean, at each look


class LossWeighting(nn.Module):
    """The sum of named losses under one of the rules. Its running means and learnt scales are in its state dict.

    Args:
        weights: by name, above 0; what the rule scales.

    Raises:
        UserError: no such rule.
    """

    sizes: Tensor

    def __init__(self, rule: str, weights: Mapping[str, float]) -> None:
        super().__init__()
        if rule not in WEIGHTINGS:
            raise UserError(f"unknown distill.weighting {rule!r}: choose from {', '.join(WEIGHTINGS)}")
        self.rule, self.given = rule, dict(weights)
        self.register_buffer("sizes", torch.zeros(len(weights)))  # running means; 0: not seen yet
        self.log_variance = nn.Parameter(torch.zeros(len(weights))) if rule == "uncertainty" else None

    def forward(self, losses: Mapping[str, Tensor], share: float | Tensor = 1.0) -> Tensor:
        """The weighted sum.

        Args:
            losses: those of the names given, scalars; shares of a mean over the global batch.
            share: of the batch that they stand for.
        """
        values = torch.stack([losses[name] for name in self.given])  # [n]
        total = (self.weights().to(values) * values).sum()
        if self.log_variance is not None:
            total = total + share * (self._base().to(values) * self.log_variance / 2).sum()
        return total

    def weights(self) -> Tensor:
        """What each loss is multiplied with now, [n]. Running means share out what the given weights add up to."""
        base = self._base()
        if self.log_variance is not None:
            return base * torch.exp(-self.log_variance) / 2
        if self.rule == "static" or not bool((self.sizes > 0).all()):
            return base
        mean = (base * self.sizes).sum() / base.sum()
        return base * mean / self.sizes

    @torch.no_grad()
    def observe(self, sizes: Tensor) -> None:
        """Take note of how large the losses, or their gradients, are now: [n] above 0."""
        sizes = sizes.to(self.sizes).clamp_min(1e-8)
        seen = bool((self.sizes > 0).all())
        self.sizes.copy_(torch.lerp(sizes, self.sizes, _KEPT) if seen else sizes)

    def _base(self) -> Tensor:
        return self.sizes.new_tensor(list(self.given.values()))
