"""Text conditioning.

prefix (arXiv 2601.14786, variants a and b): the projected text tokens come before the audio. Padding is moved after
the audio, where a causal model cannot see it, so it changes nothing and training needs no mask.
cross_attention (variants c and d; MusicGen, arXiv 2306.05284): every block attends to the projected tokens; padding is
masked. adaln (DiT, arXiv 2212.09748): the mean token shifts, scales and gates every sublayer.
Shapes: B batch, L text tokens, S audio positions, E text embedding width, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers.base import gather_positions
from ssmttm.ops.linear import Linear
from ssmttm.text.condition import TextCondition


class PrefixedSequence(NamedTuple):
    """Text and audio in one sequence; each row is [text tokens | audio | padding].

    x: [B, L+S, D]. mask: [B, L+S] bool, True at valid positions. audio: [B, S], the index of each audio position.
    """

    x: Tensor
    mask: Tensor
    audio: Tensor


class ProjectedText(NamedTuple):
    """Captions in the model's width. tokens: [B, L, D], 0 at padding. mask: [B, L] bool, True at valid tokens."""

    tokens: Tensor
    mask: Tensor

    def mean(self) -> Tensor:
        """Mean over the valid tokens, [B, D]; 0 where there are none."""
        return self.tokens.sum(1) / self.mask.sum(1, keepdim=True).clamp(min=1).to(self.tokens.dtype)


class TextProjection(nn.Module):
    """Linear, and LayerNorm if `norm`: [B, L, E] -> [B, L, D]. Values at padding are not read."""

    def __init__(self, text_dim: int, d_model: int, norm: bool = True) -> None:
        super().__init__()
        self.linear = Linear(text_dim, d_model)
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()

    def forward(self, text: TextCondition) -> ProjectedText:
        """Raises UserError if the embeddings are not `text_dim` wide."""
        width, text_dim = text.embeddings.shape[-1], self.linear.in_features
        if width != text_dim:
            raise UserError(f"text embeddings have width {width}, model.text_dim is {text_dim}: use its text encoder")
        padding = ~text.mask[..., None]
        embeddings = text.embeddings.masked_fill(padding, 0).to(self.linear.weight.dtype)
        return ProjectedText(self.norm(self.linear(embeddings)).masked_fill(padding, 0), text.mask)

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * self.linear.weight.numel()

    def init_weights(self) -> None:
        nn.init.zeros_(self.linear.bias)


def prefix(text: ProjectedText, audio: Tensor) -> PrefixedSequence:
    """Put the text before the audio [B, S, D], and padding after both."""
    mask = torch.cat([text.mask, text.mask.new_ones(audio.shape[:2])], 1)  # [B, L+S]
    order = torch.argsort(~mask, dim=1, stable=True)
    x = gather_positions(torch.cat([text.tokens.to(audio.dtype), audio], 1), order)
    mask = mask.gather(1, order)
    positions = text.mask.sum(1, keepdim=True) + torch.arange(audio.shape[1], device=audio.device)  # [B, S]
    return PrefixedSequence(x, mask, positions)


class SinusoidalEmbedding(nn.Module):
    """Sinusoids of a scalar, linear, SiLU, linear: [B] -> [B, W], W even."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(sinusoids(values, self.width).to(next(self.parameters()).dtype))

    def flops(self) -> int:
        """FLOPs of one value."""
        return 2 * 2 * self.width**2

    def init_weights(self, std: float) -> None:
        """Normal weights in the last layer, zero biases."""
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.zeros_(linear.bias)
        nn.init.normal_(linears[-1].weight, std=std)


def sinusoids(positions: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embeddings, cosines then sines, as in audiocraft: positions [...] -> [..., width]."""
    half = width // 2
    rates = max_period ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1))
    phases = positions[..., None].float() * rates
    return torch.cat([phases.cos(), phases.sin()], -1)
