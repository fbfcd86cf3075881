"""A one-dimensional U-Net with attention, after DiscoDiff's (IEEE 10888056; see also arXiv 2006.11239).

Every level halves the frame rate. Norms act on each frame alone, where DiscoDiff has GroupNorm, so neither padding nor
the window length changes other frames.
Shapes: B batch, T frames, D model width, W width of a level, H heads, P = W / H, E width of the timestep embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmttm.mixers.bidirectional import FullAttention
from ssmttm.models.conditioning import ProjectedText
from ssmttm.models.cross_attention import CrossAttention

_KERNEL = 3


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, convolution, with scale and shift from the timestep embedding; the identity at first."""

    def __init__(self, width_in: int, width: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.RMSNorm(width_in, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.conv_in, self.conv_out = MaskedConv(width_in, width), MaskedConv(width, width)
        self.adaln = nn.Linear(time_dim, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if width_in == width else nn.Linear(width_in, width)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, W'] -> [B, T, W]."""
        h = self.conv_in(F.silu(self.norm_in(x)), mask).to(x.dtype)
        scale, shift = self.adaln(F.silu(embedding))[:, None].chunk(2, -1)  # [B, 1, W]
        h = F.silu(self.norm_out(h) * (1 + scale) + shift)
        return self.skip(x).to(x.dtype) + self.conv_out(self.dropout(h), mask)

    def flops(self, n_frames: int) -> int:
        linear = 0 if isinstance(self.skip, nn.Identity) else self.skip.weight.numel()
        per_frame = self.conv_in.weight.numel() + self.conv_out.weight.numel() + linear
        return 2 * (n_frames * per_frame + self.adaln.weight.numel())


class MaskedConv(nn.Conv1d):
    """Convolution over frames, [B, T, W'] -> [B, T, W]; masked frames count as 0."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, _KERNEL, padding=_KERNEL // 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(_masked(x, mask).transpose(1, 2)).transpose(1, 2)


class LinearAttention(nn.Module):
    """Linear attention (arXiv 1812.01243): softmax of q over features, of k over frames."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, W] -> [B, T, W]."""
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b t (n h p) -> n b t h p", n=3, h=self.n_heads)  # [B, T, H, P] each
        if mask is not None:
            k = k.masked_fill(~mask[..., None, None], -torch.inf)
        context = torch.einsum("bthp,bthq->bhpq", k.softmax(1), v)
        return x + self.out(rearrange(torch.einsum("bthp,bhpq->bthq", q.softmax(-1), context), "b t h q -> b t (h q)"))

    def flops(self, n_frames: int) -> int:
        width = self.out.weight.shape[0]
        return 2 * n_frames * (4 * width * width + 2 * width * width // self.n_heads)


class TextCrossAttention(nn.Module):
    """Norm and cross-attention to the text, whose tokens are projected to the level's width."""

    def __init__(self, d_model: int, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.widen = nn.Identity() if width == d_model else nn.Linear(d_model, width)
        self.cross = CrossAttention(width, n_heads, dropout)

    def forward(self, x: Tensor, text: ProjectedText) -> Tensor:
        """x [B, T, W] -> [B, T, W]."""
        return x + self.cross(self.norm(x), self.cross.project_keys(self.widen(text.tokens), text.mask))

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        widen = 0 if isinstance(self.widen, nn.Identity) else 2 * n_text_tokens * self.widen.weight.numel()
        return widen + self.cross.flops(n_frames, n_text_tokens)


class Level(nn.Module):
    """Residual blocks, linear attention over the frames, cross-attention to the text."""

    def __init__(
        self, d_model: int, width_in: int, width: int, n_blocks: int, time_dim: int, n_heads: int, dropout: float
    ) -> None:
        super().__init__()
        widths = [width_in, *[width] * (n_blocks - 1)]
        self.blocks: Any = nn.ModuleList(ResidualBlock(w, width, time_dim, dropout) for w in widths)
        self.attention = LinearAttention(width, n_heads)
        self.text = TextCrossAttention(d_model, width, n_heads, dropout)

    def forward(self, x: Tensor, embedding: Tensor, text: ProjectedText, mask: Tensor | None) -> Tensor:
        """x [B, T, W'] -> [B, T, W]."""
        for block in self.blocks:
            x = block(x, embedding, mask)
        return self.text(self.attention(x, mask), text)

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        blocks = sum(block.flops(n_frames) for block in self.blocks)
        return blocks + self.attention.flops(n_frames) + self.text.flops(n_frames, n_text_tokens)


class UNet(nn.Module):
    """Levels down, attention in the middle, levels up with skip connections; widths are `mults` times `d_model`."""

    def __init__(
        self, d_model: int, mults: Sequence[int], n_blocks: int, time_dim: int, n_heads: int, dropout: float
    ) -> None:
        super().__init__()
        widths = [d_model * mult for mult in mults]
        options = (n_blocks, time_dim, n_heads, dropout)
        outer = [d_model, *widths[:-1]]
        self.down: Any = nn.ModuleList(
            Level(d_model, width_in, width, *options) for width_in, width in zip(outer, widths, strict=True)
        )
        self.middle_in = ResidualBlock(widths[-1], widths[-1], time_dim, dropout)
        self.middle_norm = nn.RMSNorm(widths[-1], eps=1e-5)
        self.middle_attention = FullAttention(widths[-1], n_heads, dropout)
        self.middle_out = ResidualBlock(widths[-1], widths[-1], time_dim, dropout)
        self.up: Any = nn.ModuleList(
            Level(d_model, 2 * width, width_out, *options) for width_out, width in zip(outer, widths, strict=True)
        )
        self.stride = 2 ** (len(widths) - 1)

    def forward(self, x: Tensor, embedding: Tensor, text: ProjectedText, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D], any T, embedding [B, E] -> [B, T, D]; frames where `mask` [B, T] is False change no other."""
        length = x.shape[1]
        if missing := -length % self.stride:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        skips, masks = [], [mask]
        for index, level in enumerate(self.down):
            if index:
                x = _downsample(x, masks[-1])
                mask = None if mask is None else mask.unflatten(1, (-1, 2)).any(2)
                masks.append(mask)
            x = level(x, embedding, text, masks[-1])
            skips.append(x)
        x = self.middle_in(x, embedding, masks[-1])
        x = x + self.middle_attention(self.middle_norm(x), masks[-1])
        x = self.middle_out(x, embedding, masks[-1])
        for index in reversed(range(len(self.up))):
            x = self.up[index](torch.cat([x, skips[index]], -1), embedding, text, masks[index])
            if index:
                x = x.repeat_interleave(2, dim=1)
        return x[:, :length]

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one item."""
        lengths = [-(-n_frames // self.stride) * self.stride // 2**index for index in range(len(self.down))]
        total = sum(module.flops(lengths[-1]) for module in (self.middle_in, self.middle_attention, self.middle_out))
        for levels in (self.down, self.up):
            total += sum(level.flops(length, n_text_tokens) for level, length in zip(levels, lengths, strict=True))
        return total


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def _downsample(x: Tensor, mask: Tensor | None) -> Tensor:
    """Means over pairs of frames, of the valid ones only: [B, T, W] -> [B, T/2, W]."""
    pairs = rearrange(_masked(x, mask), "b (t two) w -> b t two w", two=2)
    if mask is None:
        return pairs.mean(2)
    return pairs.sum(2) / rearrange(mask, "b (t two) -> b t two", two=2).sum(2).clamp(min=1)[..., None]
