"""Pre-norm residual blocks: x += dropout(sublayer(norm(x))) for each sublayer.

"simba" is a mixer and an MLP, "mamba" is two mixers (variants b and a of arXiv 2601.14786). Cross-attention to the text
follows the first mixer (variants c and d). With adaLN the text shifts, scales and gates every sublayer (arXiv
2212.09748); layer_scale multiplies it by a learnt vector (arXiv 2103.17239).
Shapes: B batch, T positions, D model width, L text tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.models.conditioning import ProjectedText
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

    def step(self, x: Tensor, state: None = None) -> Tensor:
        return self(x)

    def init_state(self, *_: Any) -> None:
        """There is none."""

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * (self.fc1.weight.numel() + self.fc2.weight.numel())


class AdaLN(nn.Module):
    """Shift, scale and gate of a sublayer from the mean text token; the identity at initialisation."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = Linear(d_model, 3 * d_model)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, mean: Tensor) -> Tensor:
        """mean [B, D] -> [B, 3, D]: shift, 1 + scale, 1 + gate."""
        offsets = torch.arange(3, device=mean.device).clamp(max=1)[:, None]  # 0, 1, 1, made on the device
        return self.linear(F.silu(mean)).unflatten(-1, (3, -1)) + offsets


Text = ProjectedText | None


@dataclass
class SublayerState:
    """`inner`: the mixer's state or the text's keys. `adaln`: [B, 3, D]. None where the sublayer has none."""

    inner: Any
    adaln: Tensor | None

    def clone(self) -> "SublayerState":
        inner = None if self.inner is None else self.inner.clone()
        return SublayerState(inner, None if self.adaln is None else self.adaln.clone())

    def write_rows(self, rows: slice, part: "SublayerState") -> None:
        """Copy the state of a smaller batch into some rows."""
        if self.inner is not None:
            self.inner.write_rows(rows, part.inner)
        if self.adaln is not None and part.adaln is not None:
            self.adaln[rows] = part.adaln


@dataclass(frozen=True)
class SublayerConfig:
    """Options shared by all sublayers of a model; see `TokenLMConfig`."""

    dropout: float = 0.0
    norm: str = "rms"
    layer_scale: float | None = None
    use_adaln: bool = False


def build_norm(kind: str, d_model: int) -> nn.Module:
    """`rms` or `layer`."""
    return nn.RMSNorm(d_model, eps=1e-5) if kind == "rms" else nn.LayerNorm(d_model)


class Sublayer(nn.Module):
    """Norm, adaLN, `inner` (a mixer, unless a subclass says otherwise), layer scale, dropout."""

    inner: Any

    def __init__(self, d_model: int, inner: nn.Module, config: SublayerConfig) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, d_model)
        self.inner = inner
        self.dropout = nn.Dropout(config.dropout)
        scale = config.layer_scale
        self.layer_scale = None if scale is None else nn.Parameter(torch.full((d_model,), float(scale)))
        self.adaln = AdaLN(d_model) if config.use_adaln else None

    def forward(self, x: Tensor, text: Text, state: SublayerState | None, mask: Tensor | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. With a state, what later steps need of the text is stored in it."""
        adaln = self._adaln_of_text(x, text, state)
        h = self._modulate(self.norm(x), adaln)
        return self._scale(self._inner_forward(h, text, state, mask), adaln)

    def step(self, x: Tensor, state: SublayerState) -> Tensor:
        """x [B, D] -> [B, D]."""
        h = self._modulate(self.norm(x), state.adaln)
        return self._scale(self.inner.step(h, state.inner), state.adaln)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SublayerState:
        """The state before any text and audio."""
        weight = next(self.norm.parameters())
        device = device or weight.device
        adaln = None
        if self.adaln is not None:
            no_text = torch.zeros(batch_size, len(weight), device=device, dtype=weight.dtype)
            adaln = self.adaln(no_text).detach()
        return SublayerState(self.inner.init_state(batch_size, device, dtype), adaln)

    def flops(self, n_tokens: int, n_text_tokens: int) -> int:
        adaln = 0 if self.adaln is None else 2 * self.adaln.linear.weight.numel()
        return adaln + self._inner_flops(n_tokens, n_text_tokens)

    def init_weights(self, n_sublayers: int) -> None:
        """GPT-2's initialisation: divide the projection into the residual stream by the root of what it sums up.

        `n_sublayers` is the number of residual sublayers of the whole model.
        """
        with torch.no_grad():
            self._residual_projection().weight.div_(math.sqrt(n_sublayers))

    def _inner_forward(self, h: Tensor, text: Text, state: SublayerState | None, mask: Tensor | None) -> Tensor:
        return self.inner(h, None if state is None else state.inner, mask)

    def _inner_flops(self, n_tokens: int, n_text_tokens: int) -> int:
        return self.inner.flops(n_tokens)

    def _residual_projection(self) -> nn.Linear:
        return self.inner.out_proj

    def _adaln_of_text(self, x: Tensor, text: Text, state: SublayerState | None) -> Tensor | None:
        """[B, 3, D], from the text, from the state if the text came earlier, or for no text."""
        if self.adaln is None:
            return None
        if text is None and state is not None:
            return state.adaln
        adaln = self.adaln(x.new_zeros(len(x), x.shape[-1]) if text is None else text.mean())
        if state is not None and state.adaln is not None:
            state.adaln.copy_(adaln.detach())
        return adaln

    def _modulate(self, h: Tensor, adaln: Tensor | None) -> Tensor:
        if adaln is None:
            return h
        shift, scale, _ = (adaln[:, None] if h.ndim == 3 else adaln).unbind(-2)
        return h * scale + shift

    def _scale(self, y: Tensor, adaln: Tensor | None) -> Tensor:
        if adaln is not None:
            y = y * (adaln[:, None] if y.ndim == 3 else adaln).unbind(-2)[2]
        if self.layer_scale is not None:
            y = y * self.layer_scale
        return self.dropout(y)


class CrossAttentionSublayer(Sublayer):
    """`inner` is a `CrossAttention`; its state is the text's keys."""

    def _inner_forward(self, h: Tensor, text: Text, state: SublayerState | None, mask: Tensor | None) -> Tensor:
        """With keys of the text, of the state if the text came earlier, or of no text."""
        if text is None:
            return self.inner(h, self.inner.init_state(len(h), h.device, h.dtype) if state is None else state.inner)
        keys = self.inner.project_keys(*text)
        if state is not None:
            state.inner = keys.detach()
        return self.inner(h, keys)

    def _inner_flops(self, n_tokens: int, n_text_tokens: int) -> int:
        return self.inner.flops(n_tokens, n_text_tokens)


class MLPSublayer(Sublayer):
    """`inner` is an `MLP`."""

    def init_weights(self, n_sublayers: int) -> None:
        super().init_weights(n_sublayers)
        for linear in (self.inner.fc1, self.inner.fc2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _inner_forward(self, h: Tensor, text: Text, state: SublayerState | None, mask: Tensor | None) -> Tensor:
        return self.inner(h)

    def _residual_projection(self) -> nn.Linear:
        return self.inner.fc2


class Block(nn.Module):
    """Residual sublayers in sequence."""

    sublayers: Any  # nn.ModuleList of Sublayer

    def __init__(self, sublayers: list[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(
        self, x: Tensor, text: Text = None, states: list[SublayerState] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; one state per sublayer; mask [B, T]."""
        for index, sublayer in enumerate(self.sublayers):
            x = x + sublayer(x, text, None if states is None else states[index], mask)
        return x

    def step(self, x: Tensor, states: list[SublayerState]) -> Tensor:
        """x [B, D] -> [B, D]; the states advance by one position."""
        for sublayer, state in zip(self.sublayers, states, strict=True):
            x = x + sublayer.step(x, state)
        return x

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[SublayerState]:
        return [sublayer.init_state(batch_size, device, dtype) for sublayer in self.sublayers]

    def flops(self, n_tokens: int, n_text_tokens: int) -> int:
        return sum(sublayer.flops(n_tokens, n_text_tokens) for sublayer in self.sublayers)
