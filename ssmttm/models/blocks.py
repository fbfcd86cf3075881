"""Pre-norm residual blocks: x += Dropout(branch(RMSNorm(x))) for each branch of a block.

"simba" is a mixer and an MLP, "mamba" is two mixers (variants a and b of arXiv 2601.14786).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.mixers import Mixer, MixerState


class MLP(nn.Sequential):
    """Linear, GELU, dropout, linear, with biases."""

    def __init__(self, d_model: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = round(ratio * d_model)
        super().__init__(nn.Linear(d_model, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, d_model))

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * (self[0].weight.numel() + self[3].weight.numel())


class Branch(nn.Module):
    """RMSNorm, then `inner` (a mixer, or a module that acts on each position alone), then dropout."""

    def __init__(self, d_model: int, inner: nn.Module, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.inner = inner
        self.dropout = nn.Dropout(dropout)
        self.is_mixer = hasattr(inner, "init_state")

    def forward(self, x: Tensor, state: MixerState | None, mask: Tensor | None) -> Tensor:
        """x [B, T, D] -> what is to be added to it."""
        inputs = (self.norm(x), state, mask) if self.is_mixer else (self.norm(x),)
        return self.dropout(self.inner(*inputs))

    def step(self, x: Tensor, state: MixerState | None) -> Tensor:
        """x [B, D] -> what is to be added to it."""
        return self.inner.step(self.norm(x), state) if self.is_mixer else self.inner(self.norm(x))


class Block(nn.Module):
    """Branches one after the other, each with its own norm and residual."""

    def __init__(self, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor, states: list[MixerState | None] | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; one state a branch, None for a branch that is no mixer; mask [B, T]."""
        for branch, state in zip(self.branches, states or [None] * len(self.branches), strict=True):
            x = x + branch(x, state, mask)
        return x

    def step(self, x: Tensor, states: list[MixerState | None]) -> Tensor:
        """x [B, D] -> [B, D], the states moved on by one position."""
        for branch, state in zip(self.branches, states, strict=True):
            x = x + branch.step(x, state)
        return x

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[MixerState | None]:
        return [b.inner.init_state(batch_size, device, dtype) if b.is_mixer else None for b in self.branches]

    def flops(self, n_tokens: int) -> int:
        return sum(branch.inner.flops(n_tokens) for branch in self.branches)


def build_block(kind: str, d_model: int, mixers: list[Mixer], mlp_ratio: float, dropout: float) -> Block:
    """A block of `kind` "simba" (takes one mixer) or "mamba" (takes two)."""
    inner: list[Any] = [*mixers, MLP(d_model, mlp_ratio, dropout)] if kind == "simba" else mixers
    return Block([Branch(d_model, module, dropout) for module in inner])
