"""The denoiser's stack: blocks of a bidirectional mixer, cross-attention to the text and an MLP, each with adaLN-Zero.

With state-space mixers its cost is linear in the length; with attention it is a DiT (arXiv 2212.09748).
Shapes: B batch, T frames, D model width, E width of the timestep embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.mixers.bidirectional import build_bidirectional
from ssmttm.models.blocks import MLP
from ssmttm.models.conditioning import ProjectedText
from ssmttm.models.cross_attention import CrossAttention


class AdaLNSublayer(nn.Module):
    """x + gate * inner(norm(x) * (1 + scale) + shift), modulated by the timestep embedding (adaLN-Zero).

    shift, scale and gate start at 0, so a new sublayer adds nothing.
    """

    def __init__(self, d_model: int, time_dim: int, inner: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5, elementwise_affine=False)
        self.adaln = nn.Linear(time_dim, 3 * d_model)
        self.inner: Any = inner
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, embedding: Tensor, *inputs: Any) -> Tensor:
        """x [B, T, D], embedding [B, E] -> [B, T, D]; `inputs` are further inputs of `inner`."""
        shift, scale, gate = self.adaln(F.silu(embedding))[:, None].chunk(3, -1)  # [B, 1, D]
        return x + gate * self.inner(self.norm(x) * (1 + scale) + shift, *inputs)


class DenoiserBlock(nn.Module):
    """Bidirectional mixer, cross-attention, MLP."""

    def __init__(self, d_model: int, time_dim: int, mixer: nn.Module, n_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.mixer = AdaLNSublayer(d_model, time_dim, mixer)
        self.cross = AdaLNSublayer(d_model, time_dim, CrossAttention(d_model, n_heads, dropout))
        self.mlp = AdaLNSublayer(d_model, time_dim, MLP(d_model, mlp_ratio, dropout))

    def forward(self, x: Tensor, embedding: Tensor, text: ProjectedText, mask: Tensor | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = self.mixer(x, embedding, mask)
        x = self.cross(x, embedding, self.cross.inner.project_keys(*text))
        return self.mlp(x, embedding)

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        mixers = self.mixer.inner.flops(n_frames) + self.cross.inner.flops(n_frames, n_text_tokens)
        adaln = sum(2 * sublayer.adaln.weight.numel() for sublayer in (self.mixer, self.cross, self.mlp))
        return mixers + self.mlp.inner.flops(n_frames) + adaln


class DenoiserStack(nn.Module):
    """Blocks in sequence; `layers` names their mixers and is repeated over the depth, `options` are the mixers'."""

    def __init__(
        self, d_model: int, n_layers: int, layers: Sequence[str], time_dim: int, mlp_ratio: float, options: dict
    ) -> None:
        super().__init__()
        heads, dropout = options["n_heads"], options["dropout"]
        self.blocks: Any = nn.ModuleList(
            DenoiserBlock(d_model, time_dim, build_bidirectional(name, d_model, **options), heads, mlp_ratio, dropout)
            for name in (layers[index % len(layers)] for index in range(n_layers))
        )

    def forward(self, x: Tensor, embedding: Tensor, text: ProjectedText, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D], embedding [B, E] -> [B, T, D]; frames where `mask` [B, T] is False change no other."""
        for block in self.blocks:
            x = block(x, embedding, text, mask)
        return x

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one item."""
        return sum(block.flops(n_frames, n_text_tokens) for block in self.blocks)
