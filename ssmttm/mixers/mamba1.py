"""Mamba-1 (Gu and Dao, arXiv 2312.00752): projection, short convolution, selective scan, gate, projection.

Parameter names, shapes and initial values are those of mamba_ssm's `Mamba`, so a state dict loads either way.
Shapes: B batch, T positions, D model width, I = expand * D inner width, R = dt_rank, N state.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.mixers.base import TensorState, UnpaddedRows, check_sizes, check_state
from ssmttm.ops.conv import causal_conv, causal_conv_step
from ssmttm.ops.linear import Linear, linear
from ssmttm.ops.selective_scan import selective_scan, selective_scan_flops, selective_scan_step


@dataclass
class Mamba1State(TensorState):
    """conv_state [B, I, d_conv - 1]: the convolution's last inputs; ssm_state [B, I, N], float32."""

    conv_state: Tensor
    ssm_state: Tensor


class Mamba1(nn.Module):
    """The mixer. `dt_rank` is the width that the step in time is projected through; "auto" is ceil(d_model / 16).

    Raises:
        UserError: a size is below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, dt_rank
        self.d_inner = expand * d_model
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)  # x, z
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)  # dt, B, C
        self.dt_proj = Linear(dt_rank, self.d_inner)  # whose weight starts within dt_rank ** -0.5, as it should
        dt = torch.exp(torch.rand(self.d_inner) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True

    def forward(self, x: Tensor, state: Mamba1State | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `state` and `mask` [B, T] as in `ssmttm.mixers.base`.

        Raises:
            UserError: the state is of another batch size.
        """
        if state is not None:
            check_state(state.ssm_state.shape[0], x.shape[0])
        if mask is None:
            return self._scan(x, state, None)
        compacted = UnpaddedRows(x, mask)
        return compacted.restore(self._scan(compacted.x, state, compacted))

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba1State) -> Tensor:
        """One position, x [B, D] -> [B, D]; `state` is updated in place. Carries no gradient.

        Raises:
            UserError: the state is of another batch size.
        """
        check_state(state.ssm_state.shape[0], x.shape[0])
        x, z = self.in_proj(x).chunk(2, -1)  # [B, I]
        x = causal_conv_step(x, self.conv1d.weight[:, 0], self.conv1d.bias, state.conv_state, "silu")
        y = selective_scan_step(x, *self._operands(x), state.ssm_state)
        return self.out_proj(y * F.silu(z))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba1State:
        """The state before the first position: zeros. `dtype` is that of the activations (default: of the weights)."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv_state = torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ssm_state = torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=wide)
        return Mamba1State(conv_state.transpose(1, 2), ssm_state)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_tokens` positions: projections, convolution and scan."""
        layers = self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj
        linear = sum(layer.weight.numel() for layer in layers)
        return 2 * linear * n_tokens + selective_scan_flops(n_tokens, self.d_inner, self.d_state)

    def _scan(self, x: Tensor, state: Mamba1State | None, compacted: UnpaddedRows | None) -> Tensor:
        """x [B, T, D] with its masked positions, if any, behind the real ones."""
        x, z = self.in_proj(x).chunk(2, -1)  # [B, T, I]
        conv_state, ssm_state = (None, None) if state is None else (state.conv_state, state.ssm_state)
        lengths = None if compacted is None else compacted.lengths
        x, conv_state = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, conv_state, "silu", lengths)
        dt, A, B, C, D = self._operands(x)
        if compacted is not None:
            dt = dt.masked_fill(compacted.padding()[..., None], 0)  # no step in time: the state stays
        y, ssm_state = selective_scan(x, dt, A, B, C, D, ssm_state)
        if state is not None:
            state.conv_state.copy_(conv_state.detach())
            state.ssm_state.copy_(ssm_state.detach())
        return self.out_proj(y * F.silu(z))

    def _operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """dt, A, B, C, D of the scan, from the convolution's output, with or without a T axis."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        A = -torch.exp(self.A_log.to(wide))
        return dt, A, B, C, self.D
