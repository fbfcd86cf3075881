"""Causal self-attention (Vaswani et al., arXiv 1706.03762), with optional rotary positions (arXiv 2104.09864).

Parameter names are those of transformers' MusicGen. A sequence's rows may be of different lengths.
Shapes: B batch, T positions, D model width, H heads, P = D / H, S slots of the cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers.base import TensorState, UnpaddedRows, check_sizes, check_state
from ssmttm.ops.linear import Linear
from ssmttm.ops.rotary import rotary

BLOCK = 64  # steps look at a multiple of this many slots: a longer row in the batch hardly changes how sums are rounded


@dataclass
class AttentionState(TensorState):
    """Keys and values [B, S, H, P] of the past, and how many of them each row has, lengths [B].

    The cache grows by doubling. `longest` is the greatest length, known without asking the device.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    longest: int = 0

    def append(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Take in [B, T, H, P], of whose rows the first `counts` [B] positions are real, or all."""
        batch, length = keys.shape[:2]
        positions = torch.arange(length, device=keys.device)
        if counts is None:
            rows = torch.arange(batch, device=keys.device)[:, None]  # [B, 1]
            self.longest += length
        else:
            rows, positions = (positions < counts[:, None]).nonzero(as_tuple=True)
            self.longest = int((self.lengths + counts).max())
        self._reserve(self.longest)
        slots = self.lengths[rows] + positions
        self.keys[rows, slots] = keys[rows, positions].to(self.keys.dtype)
        self.values[rows, slots] = values[rows, positions].to(self.values.dtype)
        self.lengths += length if counts is None else counts

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, S, H, P] up to the longest row's end or a little further, and which are real, [B, S]."""
        slots = math.ceil(self.longest / BLOCK) * BLOCK
        real = torch.arange(slots, device=self.lengths.device) < self.lengths[:, None]
        return self.keys[:, :slots], self.values[:, :slots], real

    def put(self, rows: slice, part: "AttentionState") -> None:
        self._reserve(part.longest)
        for cache, new in ((self.keys, part.keys), (self.values, part.values)):
            cache[rows, : part.longest] = new[:, : part.longest].to(cache.dtype)
        self.lengths[rows] = part.lengths
        self.longest = int(self.lengths.max())

    def _reserve(self, slots: int) -> None:
        """Make room for that many slots, by doubling."""
        room = BLOCK << max(0, math.ceil(slots / BLOCK) - 1).bit_length()
        missing = room - self.keys.shape[1]
        if missing > 0:
            self.keys, self.values = (F.pad(cache, (0, 0, 0, 0, 0, missing)) for cache in (self.keys, self.values))


class HeadProjections(nn.Module):
    """What self-attention and cross-attention are made of; `bias` is that of q, k and v.

    Raises:
        UserError: `n_heads` does not divide `d_model`, or is below 1.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float, bias: bool, out_bias: bool) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise UserError(f"n_heads {n_heads} does not divide d_model {d_model}: choose a divisor")
        self.d_model, self.n_heads, self.dropout = d_model, n_heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, d_model, bias=bias) for _ in range(3))
        self.out_proj = Linear(d_model, d_model, bias=out_bias)


class Attention(HeadProjections):
    """The mixer; `dropout` acts on the attention's weights, in training only.

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
            raise UserError(f"rotary heads need an even width, not {d_model // n_heads}: choose another n_heads")
        self.rotary = rotary

    def forward(self, x: Tensor, state: AttentionState | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `state` and `mask` [B, T] as in `ssmttm.mixers.base`.

        Raises:
            UserError: the state is of another batch size.
        """
        if state is not None:
            check_state(state.lengths.shape[0], x.shape[0])
        if mask is None:
            return self._attend(x, state, None)
        compacted = UnpaddedRows(x, mask)
        return compacted.restore(self._attend(compacted.x, state, compacted.lengths))

    @torch.no_grad()
    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """One position, x [B, D] -> [B, D]; `state` is updated in place. Carries no gradient.

        Raises:
            UserError: the state is of another batch size.
        """
        check_state(state.lengths.shape[0], x.shape[0])
        q, k, v = self._project(x[:, None], state.lengths[:, None])  # [B, 1, H, P]
        state.append(k, v)
        keys, values, seen = state.filled()
        y = _look(q.to(keys.dtype), keys, values, seen[:, None])
        return self.out_proj(y[:, 0].to(q.dtype))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state before the first position. `dtype` is that of the activations (default: of the weights)."""
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = batch_size, BLOCK, self.n_heads, self.d_model // self.n_heads
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(keys, values, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_tokens` positions: projections, and each position's look at the past."""
        pairs = n_tokens * (n_tokens + 1) // 2
        return 8 * n_tokens * self.d_model**2 + 4 * pairs * self.d_model

    def _attend(self, x: Tensor, state: AttentionState | None, lengths: Tensor | None) -> Tensor:
        """x [B, T, D], of whose rows the first `lengths` positions are real: no real one looks behind them."""
        positions = torch.arange(x.shape[1], device=x.device)[None]  # [1, T]
        q, k, v = self._project(x, positions if state is None else state.lengths[:, None] + positions)
        dropout = self.dropout if self.training else 0.0
        if state is None or state.longest == 0:
            y = _look(q, k, v, dropout=dropout)
        else:
            past = torch.arange(state.longest, device=x.device) < state.lengths[:, None]  # [B, S]
            now = positions <= positions.mT  # [T, T]
            seen = torch.cat([past[:, None].expand(-1, len(now), -1), now.expand(len(x), -1, -1)], 2)  # [B, T, S+T]
            keys, values = (
                torch.cat([cache[:, : state.longest].to(new.dtype), new], 1)
                for cache, new in ((state.keys, k), (state.values, v))
            )
            y = _look(q, keys, values, seen, dropout)
        if state is not None:
            state.append(k.detach(), v.detach(), lengths)
        return self.out_proj(y)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> queries, keys and values [B, T, H, P]; positions [B, T] or [1, T]."""
        q, k, v = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return (rotary(q, positions), rotary(k, positions), v) if self.rotary else (q, k, v)


def _look(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Queries [B, T, H, P] at the keys and values that they may see, [B, T, S] -> [B, T, D]; None means causal."""
    q, k, v = (M.transpose(1, 2) for M in (q, k, v))  # [B, H, T or S, P]
    mask = None if seen is None else seen[:, None]  # [B, 1, T, S]
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=seen is None)
    return y.transpose(1, 2).flatten(2)
