"""Rotary position embedding (RoFormer, Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor

from ssmttm.ops.common import accumulation_dtype


def rotary(x: Tensor, positions: Tensor, max_period: float = 10_000.0) -> Tensor:
    """Rotate each pair of neighbouring features by its position's angle, equation 34.

    Args:
        x: [B, T, H, P], P even.
        positions: [B, T] or [1, T]; pair i is rotated by position * max_period^(-2i/P).

    Returns:
        [B, T, H, P] in the dtype of `x`; the angles are float32 at least.
    """
    dtype = accumulation_dtype(x)
    rates = max_period ** -torch.linspace(0, 1, x.shape[-1] // 2 + 1, device=x.device, dtype=dtype)[:-1]  # [P/2]
    angles = (positions[..., None].to(dtype) * rates)[:, :, None]  # [B, T, 1, P/2]
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, P/2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
