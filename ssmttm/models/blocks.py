"""Pre-norm residual blocks: x += Dropout(branch(norm(x))) for each branch of a block.

"simba" is a mixer and an MLP, "mamba" is two mixers (variants b and a of arXiv 2601.14786); with cross-attention, a
look at the text stands behind the first mixer (variants c and d). With adaln every branch is shifted, scaled and gated
by the text (arXiv 2212.09748), with layer_scale scaled by a learnt vector (arXiv 2103.17239).
Shapes: B batch, T positions, D model width, L text tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.mixers import Mixer, MixerState
from ssmttm.models.conditioning import ProjectedText
from ssmttm.models.cross_attention import CrossAttention, TextKeys
from ssmttm.ops.linear import Linear


class MLP(nn.Module):
    """Linear, GELU, dropout, linear: [..., D] -> [..., D]."""

    def __init__(self, d_model: int, ratio: float, dropout: float = 0.0, bias: bool = True) -> None:
        hidden = round(ratio * d_model)
        super().__init__()
        self.fc1 = Linear(d_model, hidden, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * (self.fc1.weight.numel() + self.fc2.weight.numel())


class AdaLN(nn.Module):
    """Shift, scale and gate of a branch from the text's mean; at the start they change nothing."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = Linear(d_model, 3 * d_model)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, mean: Tensor) -> Tensor:
        """mean [B, D] -> [B, 3, D]: shift, 1 + scale, 1 + gate."""
        return self.linear(F.silu(mean)).unflatten(-1, (3, -1)) + mean.new_tensor([0.0, 1.0, 1.0])[:, None]


@dataclass
class SublayerState:
    """What a branch carries, None where it has none: its mixer's state or its text's keys; its modulation [B, 3, D]."""

    inner: MixerState | TextKeys | None
    adaln: Tensor | None

    def clone(self) -> "SublayerState":
        return SublayerState(*(None if part is None else part.clone() for part in (self.inner, self.adaln)))

    def put(self, rows: slice, part: "SublayerState") -> None:
        """Copy a smaller state into some rows."""
        if self.inner is not None:
            self.inner.put(rows, part.inner)
        if self.adaln is not None:
            self.adaln[rows] = part.adaln


@dataclass(frozen=True)
class SublayerConfig:
    """What all sublayers of a model share; see `TokenLMConfig`."""

    dropout: float = 0.0
    norm: str = "rms"
    layer_scale: float | None = None
    use_adaln: bool = False


def build_norm(kind: str, d_model: int) -> nn.Module:
    """"rms" or "layer"."""
    return nn.RMSNorm(d_model, eps=1e-5) if kind == "rms" else nn.LayerNorm(d_model)


class Sublayer(nn.Module):
    """Norm, then `inner` (a mixer, cross-attention, or a module that acts on each position alone), then dropout."""

    def __init__(self, d_model: int, inner: nn.Module, style: SublayerConfig) -> None:
        super().__init__()
        self.norm = build_norm(style.norm, d_model)
        self.inner = inner
        self.dropout = nn.Dropout(style.dropout)
        scale = style.layer_scale
        self.layer_scale = None if scale is None else nn.Parameter(torch.full((d_model,), float(scale)))
        self.adaln = AdaLN(d_model) if style.use_adaln else None
        self.sees_text = isinstance(inner, CrossAttention)
        self.is_mixer = hasattr(inner, "init_state") and not self.sees_text

    def forward(
        self, x: Tensor, text: ProjectedText | None, state: SublayerState | None, mask: Tensor | None
    ) -> Tensor:
        """x [B, T, D] -> what is to be added to it. A text leaves in the state what later calls need of it."""
        adaln = self._adaln(x, text, state)
        h = self._modulate(self.norm(x), adaln)
        inner_state = None if state is None else state.inner
        if self.sees_text:
            y = self.inner(h, self._keys(h, text, state))
        elif self.is_mixer:
            y = self.inner(h, inner_state, mask)
        else:
            y = self.inner(h)
        return self._added(y, adaln)

    def step(self, x: Tensor, state: SublayerState) -> Tensor:
        """x [B, D] -> what is to be added to it."""
        adaln = state.adaln
        h = self._modulate(self.norm(x), adaln)
        y = self.inner.step(h, state.inner) if self.is_mixer or self.sees_text else self.inner(h)
        return self._added(y, adaln)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SublayerState:
        """The state before any text and audio."""
        device = device or self.norm.weight.device
        inner = self.inner.init_state(batch_size, device, dtype) if self.is_mixer or self.sees_text else None
        adaln = None
        if self.adaln is not None:
            no_text = torch.zeros(batch_size, self.norm.weight.shape[0], device=device, dtype=self.norm.weight.dtype)
            adaln = self.adaln(no_text).detach()
        return SublayerState(inner, adaln)

    def flops(self, n_tokens: int, n_text_tokens: int) -> int:
        inner = self.inner.flops(n_tokens, n_text_tokens) if self.sees_text else self.inner.flops(n_tokens)
        return inner + (2 * self.adaln.linear.weight.numel() if self.adaln is not None else 0)

    def _keys(self, h: Tensor, text: ProjectedText | None, state: SublayerState | None) -> TextKeys:
        """Of the text, of the text that the state remembers, or of none."""
        if text is None:
            return self.inner.init_state(len(h), h.device, h.dtype) if state is None else state.inner
        keys = self.inner.keys_of(*text)
        if state is not None:
            state.inner = keys.detach()
        return keys

    def _adaln(self, x: Tensor, text: ProjectedText | None, state: SublayerState | None) -> Tensor | None:
        """[B, 3, D]: of the text, of the text that the state remembers, or of none."""
        if self.adaln is None:
            return None
        if text is None and state is not None:
            return state.adaln
        adaln = self.adaln(x.new_zeros(len(x), x.shape[-1]) if text is None else text.mean())
        if state is not None:
            state.adaln.copy_(adaln.detach())
        return adaln

    def _modulate(self, h: Tensor, adaln: Tensor | None) -> Tensor:
        if adaln is None:
            return h
        shift, scale, _ = _over_positions(adaln, h)
        return h * scale + shift

    def _added(self, y: Tensor, adaln: Tensor | None) -> Tensor:
        if adaln is not None:
            y = y * _over_positions(adaln, y)[2]
        if self.layer_scale is not None:
            y = y * self.layer_scale
        return self.dropout(y)


def _over_positions(adaln: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """[B, 3, D] -> three tensors that broadcast over x, [B, T, D] or [B, D]."""
    parts = adaln.unbind(1)
    return tuple(part[:, None] for part in parts) if x.ndim == 3 else parts


class Block(nn.Module):
    """Branches one after the other, each with its own norm and residual."""

    def __init__(self, sublayers: list[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(
        self,
        x: Tensor,
        text: ProjectedText | None = None,
        states: list[SublayerState] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; one state a branch; mask [B, T]."""
        for sublayer, state in zip(self.sublayers, states or [None] * len(self.sublayers), strict=True):
            x = x + sublayer(x, text, state, mask)
        return x

    def step(self, x: Tensor, states: list[SublayerState]) -> Tensor:
        """x [B, D] -> [B, D], the states moved on by one position."""
        for sublayer, state in zip(self.sublayers, states, strict=True):
            x = x + sublayer.step(x, state)
        return x

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[SublayerState]:
        return [sublayer.init_state(batch_size, device, dtype) for sublayer in self.sublayers]

    def flops(self, n_tokens: int, n_text_tokens: int) -> int:
        return sum(sublayer.flops(n_tokens, n_text_tokens) for sublayer in self.sublayers)


def build_block(
    kind: str, d_model: int, mixers: list[Mixer], cross: CrossAttention | None, mlp: MLP, style: SublayerConfig
) -> Block:
    """A block of `kind` "simba" (takes one mixer) or "mamba" (takes two, and no MLP)."""
    first, *second = mixers
    inner: list[Any] = [first, *([cross] if cross is not None else []), *second, *([mlp] if kind == "simba" else [])]
    return Block([Sublayer(d_model, module, style) for module in inner])
