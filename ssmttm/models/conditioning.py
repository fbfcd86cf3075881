"""Conditioning on text: what a caption becomes before it meets the audio.

prefix (arXiv 2601.14786, variants a and b): the projected text tokens stand in front of the audio. Padding is moved
behind the audio, where a causal model cannot see it, so that it changes nothing and training needs no mask.
cross_attention (variants c and d; MusicGen, arXiv 2306.05284): every block looks at the projected tokens, the scores of
padding masked. adaln (DiT, arXiv 2212.09748): the mean of the tokens shifts, scales and gates every branch.
Shapes: B batch, L text tokens, S audio positions, E text width (or of a number's embedding), D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers.base import gather_positions
from ssmttm.ops.linear import Linear
from ssmttm.text.condition import TextCondition


class Prefixed(NamedTuple):
    """Text and audio in one sequence, each row as [its text tokens | its audio | padding].

    x: [B, L+S, D]. mask: [B, L+S] bool, True where a position is real. audio: [B, S], where each audio position stands.
    """

    x: Tensor
    mask: Tensor
    audio: Tensor


class ProjectedText(NamedTuple):
    """Captions in the model's width. tokens: [B, L, D], 0 at padding. mask: [B, L] bool, True where a token is real."""

    tokens: Tensor
    mask: Tensor

    def mean(self) -> Tensor:
        """The mean of the real tokens, [B, D]; 0 where there are none."""
        return self.tokens.sum(1) / self.mask.sum(1, keepdim=True).clamp(min=1).to(self.tokens.dtype)


class TextProjection(nn.Module):
    """Linear, and LayerNorm if `norm`: [B, L, E] -> [B, L, D]. Values at padding are not read."""

    def __init__(self, text_dim: int, d_model: int, norm: bool = True) -> None:
        super().__init__()
        self.linear = Linear(text_dim, d_model)
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()

    def forward(self, text: TextCondition) -> ProjectedText:
        """Raises UserError when the embeddings are not `text_dim` wide."""
        if text.embeddings.shape[-1] != self.linear.in_features:
            raise UserError(
                f"the text embeddings are {text.embeddings.shape[-1]} wide, model.text_dim is "
                f"{self.linear.in_features}: use the text encoder that the model was built for"
            )
        padding = ~text.mask[..., None]
        embeddings = text.embeddings.masked_fill(padding, 0).to(self.linear.weight.dtype)
        return ProjectedText(self.norm(self.linear(embeddings)).masked_fill(padding, 0), text.mask)

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * self.linear.weight.numel()


def prefix(text: ProjectedText, audio: Tensor) -> Prefixed:
    """Put text in front of audio [B, S, D], padding behind both.

    Padding is ones: at zeros RMSNorm multiplies gradients by 1/sqrt(eps) in each layer, and what rounding leaves of a
    gradient that should vanish there would explode.
    """
    mask = torch.cat([text.mask, text.mask.new_ones(audio.shape[:2])], 1)  # [B, L+S]
    order = torch.argsort(~mask, dim=1, stable=True)
    x = gather_positions(torch.cat([text.tokens.to(audio.dtype), audio], 1), order)
    mask = mask.gather(1, order)
    x = x.masked_fill(~mask[..., None], 1.0)
    positions = text.mask.sum(1, keepdim=True) + torch.arange(audio.shape[1], device=audio.device)  # [B, S]
    return Prefixed(x, mask, positions)


class SinusoidalEmbedding(nn.Module):
    """Sinusoids of a number, Linear, SiLU, Linear: [B] -> [B, E], E even."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layers(sinusoids(numbers, self.width).to(self.layers[0].weight.dtype))

    def flops(self) -> int:
        """Of one number."""
        return 2 * sum(layer.weight.numel() for layer in (self.layers[0], self.layers[2]))


def sinusoids(positions: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embeddings, cosines then sines: positions [...] -> [..., width] (the scaling of audiocraft)."""
    half = width // 2
    rates = max_period ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1))
    phases = positions[..., None].float() * rates
    return torch.cat([phases.cos(), phases.sin()], -1)
