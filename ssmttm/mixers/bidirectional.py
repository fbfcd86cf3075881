"""Bidirectional mixers, for models that are not autoregressive: no state, no step.

Shapes: B batch, T positions, D model width, H heads, P = D / H.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.mixers import Mixer, build_mixer
from ssmttm.mixers.attention import HeadProjections
from ssmttm.ops.rotary import rotary


class Bidirectional(nn.Module):
    """Two causal mixers, one of which reads the sequence in reverse; their outputs are summed.

    So a state-space mixer sees the whole sequence at a cost linear in its length (as in Vim, arXiv 2401.09417).
    """

    def __init__(self, forward_mixer: Mixer, backward_mixer: Mixer) -> None:
        super().__init__()
        self.forward_mixer, self.backward_mixer = forward_mixer, backward_mixer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; positions where `mask` [B, T] is False change no other output and give 0."""
        backwards = self.backward_mixer(x.flip(1), mask=None if mask is None else mask.flip(1))
        return self.forward_mixer(x, mask=mask) + backwards.flip(1)

    def flops(self, n_tokens: int) -> int:
        return self.forward_mixer.flops(n_tokens) + self.backward_mixer.flops(n_tokens)


class FullAttention(HeadProjections):
    """Attention without a causal mask, with rotary positions; `dropout` is that of its weights, in training.

    Raises:
        UserError: `n_heads` does not divide `d_model`.
    """

    def __init__(self, d_model: int, n_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__(d_model, n_heads, dropout, bias=False, out_bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; positions where `mask` [B, T] is False change no other output and give 0."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        q, k, v = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = rotary(q, positions).transpose(1, 2), rotary(k, positions).transpose(1, 2), v.transpose(1, 2)
        key_mask = None if mask is None else mask[:, None, None]  # [B, 1, 1, T]
        y = F.scaled_dot_product_attention(q, k, v, key_mask, self.dropout if self.training else 0.0)  # [B, H, T, P]
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y if mask is None else y.masked_fill(~mask[..., None], 0)

    def flops(self, n_tokens: int) -> int:
        return 8 * n_tokens * self.d_model**2 + 4 * n_tokens**2 * self.d_model


def build_bidirectional(name: str, d_model: int, **options: Any) -> nn.Module:
    """The bidirectional form of the mixer called `name`, with those of the options that it takes.

    Raises:
        UserError: no mixer has that name.
    """
    if name == "attention":
        return FullAttention(d_model, options["n_heads"], options["dropout"])
    return Bidirectional(*(build_mixer(name, d_model, **options) for _ in range(2)))
