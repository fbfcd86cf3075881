"""Causal self-attention (Vaswani et al., arXiv 1706.03762), with optional rotary positions (arXiv 2104.09864).

Parameter names are those of transformers' MusicGen. The rows of a batch may have different lengths.
Shapes: B batch, T positions, D model width, H heads, P = D / H, S slots of the cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError, check_sizes
from ssmttm.mixers.base import Mixer, MixerState, check_divides
from ssmttm.ops.linear import Linear
from ssmttm.ops.rotary import rotary

BLOCK = 64  # steps attend to a multiple of this many slots, so that the longest row hardly changes how sums are rounded


@dataclass
class AttentionState(MixerState):
    """Keys and values [B, S, H, P] of the past, and the number of valid ones per row, lengths [B].

    The cache grows by doubling. `longest` is the greatest length, known without a device sync.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    longest: int = 0

    def append(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Append [B, T, H, P]; `counts` [B] is the number of valid leading positions of each row (None: all)."""
        batch, length = keys.shape[:2]
        positions = torch.arange(length, device=keys.device)
        if counts is None:
            rows = torch.arange(batch, device=keys.device)[:, None]  # [B, 1]
            self.longest += length
        else:
            rows, positions = (positions < counts[:, None]).nonzero(as_tuple=True)
            self.longest = int((self.lengths + counts).max())
        self.reserve(self.longest)
        slots = self.lengths[rows] + positions
        self.keys[rows, slots] = keys[rows, positions].to(self.keys.dtype)
        self.values[rows, slots] = values[rows, positions].to(self.values.dtype)
        self.lengths += length if counts is None else counts

    def valid_entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, S, H, P] up to a multiple of BLOCK, and the mask of valid ones, [B, S]."""
        slots = math.ceil(self.longest / BLOCK) * BLOCK
        valid = torch.arange(slots, device=self.lengths.device) < self.lengths[:, None]
        return self.keys[:, :slots], self.values[:, :slots], valid

    def write_rows(self, rows: slice, part: "AttentionState") -> None:
        self.reserve(part.longest)
        for cache, new in ((self.keys, part.keys), (self.values, part.values)):
            cache[rows, : part.longest] = new[:, : part.longest].to(cache.dtype)
        self.lengths[rows] = part.lengths
        self.longest = int(self.lengths.max())

    def reserve(self, slots: int) -> None:
        """Grow the cache to at least that many slots, by doubling."""
        size = BLOCK << max(0, math.ceil(slots / BLOCK) - 1).bit_length()
        missing = size - self.keys.shape[1]
        if missing > 0:
            self.keys, self.values = (F.pad(cache, (0, 0, 0, 0, 0, missing)) for cache in (self.keys, self.values))


class HeadProjections(nn.Module):
    """The projections of self-attention and cross-attention; `bias` is that of q, k and v.

    Raises:
        UserError: `n_heads` does not divide `d_model`, or is below 1.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float, bias: bool, out_bias: bool) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        check_divides("n_heads", n_heads, "d_model", d_model)
        self.d_model, self.n_heads, self.dropout = d_model, n_heads, dropout
        self.q_proj = Linear(d_model, d_model, bias=bias)
        self.k_proj = Linear(d_model, d_model, bias=bias)
        self.v_proj = Linear(d_model, d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model, bias=out_bias)


class Attention(HeadProjections, Mixer):
    """The mixer; `dropout` is that of the attention weights, in training only.

    Raises:
        UserError: `n_heads` does not divide `d_model`, or rotary heads are of odd width.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        rotary: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, dropout, bias, out_bias)
        if rotary and d_model // n_heads % 2:
            raise UserError(f"rotary needs an even head width, got d_model / n_heads = {d_model // n_heads}")
        self.rotary = rotary

    def _step(self, x: Tensor, state: AttentionState) -> Tensor:
        q, k, v = self._project(x[:, None], state.lengths[:, None])  # [B, 1, H, P]
        state.append(k, v)
        keys, values, valid = state.valid_entries()
        y = scaled_attention(q.to(keys.dtype), keys, values, valid[:, None])
        return self.out_proj(y[:, 0].to(q.dtype))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        device, dtype = self._device_and_dtype(device, dtype)
        shape = batch_size, BLOCK, self.n_heads, self.d_model // self.n_heads
        keys, values = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        return AttentionState(keys, values, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def flops(self, n_tokens: int) -> int:
        pairs = n_tokens * (n_tokens + 1) // 2
        return 8 * n_tokens * self.d_model**2 + 4 * pairs * self.d_model

    def _forward(self, x: Tensor, state: AttentionState | None, lengths: Tensor | None) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]  # [1, T]
        q, k, v = self._project(x, positions if state is None else state.lengths[:, None] + positions)
        dropout = self.dropout if self.training else 0.0
        if state is None or state.longest == 0:
            y = scaled_attention(q, k, v, dropout=dropout)
        else:
            past = torch.arange(state.longest, device=x.device) < state.lengths[:, None]  # [B, S]
            causal = positions <= positions.mT  # [T, T]
            of_past = past[:, None].expand(-1, x.shape[1], -1)  # [B, T, S]
            mask = torch.cat([of_past, causal.expand(x.shape[0], -1, -1)], 2)  # [B, T, S+T]
            keys = torch.cat([state.keys[:, : state.longest].to(k.dtype), k], 1)  # [B, S+T, H, P]
            values = torch.cat([state.values[:, : state.longest].to(v.dtype), v], 1)
            y = scaled_attention(q, keys, values, mask, dropout)
        if state is not None:
            state.append(k.detach(), v.detach(), lengths)
        return self.out_proj(y)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> queries, keys and values [B, T, H, P]; positions [B, T] or [1, T]."""
        heads = (self.n_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return (rotary(q, positions), rotary(k, positions), v) if self.rotary else (q, k, v)


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """q [B, T, H, P], k and v [B, S, H, P], mask [B, T, S] (None: causal) -> [B, T, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T or S, P]
    mask_heads = None if mask is None else mask[:, None]  # [B, 1, T, S]
    y = F.scaled_dot_product_attention(q, k, v, mask_heads, dropout, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)
