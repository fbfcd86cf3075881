"""Cross-attention from the audio to the text (Vaswani et al., arXiv 1706.03762; MusicGen, arXiv 2306.05284).

Padding is masked, so it changes nothing; for a caption without tokens the attention output is zero. Keys and values
are computed once per caption. Parameter names are those of transformers' MusicGen.
Shapes: B batch, T positions, L text tokens, D model width, H heads, P = D / H.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ssmttm.mixers.attention import HeadProjections
from ssmttm.mixers.base import check_state

SLOTS = 128  # a state's keys are padded to a multiple of this, so that other items do not change the rounding of sums


@dataclass
class TextKeys:
    """Keys and values [B, H, L, P] of the text tokens, and mask [B, L], True at valid tokens."""

    k: Tensor
    v: Tensor
    mask: Tensor

    def clone(self) -> "TextKeys":
        return TextKeys(self.k.clone(), self.v.clone(), self.mask.clone())

    def detach(self) -> "TextKeys":
        return TextKeys(self.k.detach(), self.v.detach(), self.mask)

    def write_rows(self, rows: slice, part: "TextKeys") -> None:
        """Copy the keys of a smaller batch into some rows, growing to the longer of the two."""
        length = part.mask.shape[1]
        new_length = max(self.mask.shape[1], math.ceil(length / SLOTS) * SLOTS)
        missing = new_length - self.mask.shape[1]
        self.k = F.pad(self.k, (0, 0, 0, missing))
        self.v = F.pad(self.v, (0, 0, 0, missing))
        self.mask = F.pad(self.mask, (0, missing))
        self.k[rows, :, :length] = part.k.to(self.k.dtype)
        self.v[rows, :, :length] = part.v.to(self.v.dtype)
        self.mask[rows] = False
        self.mask[rows, :length] = part.mask


class CrossAttention(HeadProjections):
    """Multi-head attention to the text; `dropout` acts on the attention weights, in training only."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(d_model, n_heads, dropout, bias=False, out_bias=bias)

    def project_keys(self, tokens: Tensor, mask: Tensor) -> TextKeys:
        """Keys and values of projected text [B, L, D] with mask [B, L]."""
        return TextKeys(self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens)), mask)

    def forward(self, x: Tensor, keys: TextKeys) -> Tensor:
        """x [B, T, D] -> [B, T, D]. Raises UserError if the keys have another batch size."""
        check_state(keys.mask.shape[0], x.shape[0])
        q = self._heads(self.q_proj(x))  # [B, H, T, P]
        has_text = keys.mask.any(1, keepdim=True)  # [B, 1]
        mask = (keys.mask | ~has_text)[:, None, None]  # [B, 1, 1, L], no row fully masked
        dropout = self.dropout if self.training else 0.0
        k, v = keys.k.to(q.dtype), keys.v.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout).masked_fill(~has_text[..., None, None], 0)
        return self.out_proj(rearrange(y, "b h t p -> b t (h p)"))

    @torch.no_grad()
    def step(self, x: Tensor, keys: TextKeys) -> Tensor:
        """x [B, D] -> [B, D]; without gradient."""
        return self(x[:, None], keys)[:, 0]

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TextKeys:
        """Keys of no text."""
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        k = torch.zeros(batch_size, self.n_heads, SLOTS, len(weight) // self.n_heads, device=device, dtype=dtype)
        return TextKeys(k, k.clone(), torch.zeros(batch_size, SLOTS, dtype=torch.bool, device=device))

    def flops(self, n_tokens: int, n_text_tokens: int) -> int:
        """Forward FLOPs of `n_tokens` positions over `n_text_tokens` text tokens."""
        width = self.q_proj.weight.shape[0]
        return 4 * width * width * (n_tokens + n_text_tokens) + 4 * n_tokens * n_text_tokens * width

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, P]."""
        return rearrange(x, "b l (h p) -> b h l p", h=self.n_heads)
