"""Weighting of several losses.

    static       the configured weights
    magnitude    each weight divided by a running mean of the loss
    gradient     each weight divided by a running mean of the gradient norm at the code embedding (after the balancer of
                 arXiv 2210.13438, which takes it at the output)
    uncertainty  learnt: exp(-s) loss / 2 + s / 2 for each loss (arXiv 1705.07115), times the weights

A running mean counts as at least a thousandth of the largest one: a loss that has nearly vanished, such as the
divergence of a student that equals its teacher, keeps a bounded weight.

Shapes: n losses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError

WEIGHTINGS = ("static", "magnitude", "gradient", "uncertainty")
_DECAY = 0.9  # of the running means
_SMALLEST = 1e-3  # running mean, relative to the largest one


class LossWeighting(nn.Module):
    """Weighted sum of named losses with base weights above 0. Running means and learnt scales are in the state dict."""

    sizes: Tensor

    def __init__(self, rule: str, weights: Mapping[str, float]) -> None:
        super().__init__()
        if rule not in WEIGHTINGS:
            raise UserError(f"unknown distill.weighting {rule!r}: choose one of {', '.join(WEIGHTINGS)}")
        self.rule, self.base_weights = rule, dict(weights)
        self.register_buffer("sizes", torch.zeros(len(weights)))  # running means; 0: nothing observed yet
        self.log_variance = nn.Parameter(torch.zeros(len(weights))) if rule == "uncertainty" else None

    def forward(self, losses: Mapping[str, Tensor], fraction: float | Tensor = 1.0) -> Tensor:
        """The weighted sum of scalar losses, which cover a fraction of the global batch; other names are ignored."""
        values = torch.stack([losses[name] for name in self.base_weights])  # [n]
        total = (self.weights().to(values) * values).sum()
        if self.log_variance is not None:
            total = total + fraction * (self._base().to(values) * self.log_variance / 2).sum()
        return total

    def weights(self) -> Tensor:
        """The current weights, [n]. With running means the weighted losses keep the sum of the base-weighted ones."""
        base = self._base()
        if self.log_variance is not None:
            return base * torch.exp(-self.log_variance) / 2
        if self.rule == "static" or not bool((self.sizes > 0).all()):
            return base
        sizes = self.sizes.clamp_min(_SMALLEST * float(self.sizes.max()))
        return base * (base * sizes).sum() / base.sum() / sizes

    @torch.no_grad()
    def observe(self, sizes: Tensor) -> None:
        """Update the running means with the current losses or gradient norms, [n] above 0."""
        sizes = sizes.to(self.sizes).clamp_min(1e-8)
        initialised = bool((self.sizes > 0).all())
        self.sizes.copy_(torch.lerp(sizes, self.sizes, _DECAY) if initialised else sizes)

    def _base(self) -> Tensor:
        return self.sizes.new_tensor(list(self.base_weights.values()))
