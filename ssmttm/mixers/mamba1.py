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

from ssmttm.errors import check_sizes
from ssmttm.mixers.base import Mixer, MixerState, exclude_from_weight_decay, init_dt_bias, mask_padding
from ssmttm.ops.common import accumulation_dtype
from ssmttm.ops.conv import causal_conv, causal_conv_step
from ssmttm.ops.linear import Linear, linear
from ssmttm.ops.selective_scan import selective_scan, selective_scan_flops, selective_scan_step


@dataclass
class Mamba1State(MixerState):
    """conv_state [B, I, d_conv - 1]: the convolution's last inputs; ssm_state [B, I, N], float32."""

    conv_state: Tensor
    ssm_state: Tensor


class Mamba1(Mixer):
    """The mixer. `dt_rank` is the rank of the projection to dt; "auto" is ceil(d_model / 16).

    Raises:
        UserError: a size is below 1.
    """

    operations = {"conv": causal_conv, "scan": selective_scan}

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
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, rank
        self.d_inner = expand * d_model
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)  # x, z
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)  # dt, B, C
        self.dt_proj = Linear(rank, self.d_inner)  # nn.Linear's initial range is dt_rank ** -0.5, as in mamba_ssm
        with torch.no_grad():
            self.dt_proj.bias.copy_(init_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        exclude_from_weight_decay(self.A_log, self.D)

    def _step(self, x: Tensor, state: Mamba1State) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)  # [B, I]
        x = causal_conv_step(x, self.conv1d.weight[:, 0], self.conv1d.bias, state.conv_state, "silu")
        y = selective_scan_step(x, *self._operands(x), state.ssm_state)
        return self.out_proj(y * F.silu(z))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba1State:
        device, dtype = self._device_and_dtype(device, dtype)
        conv_state = torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=device, dtype=dtype)
        state_dtype = torch.promote_types(dtype, torch.float32)
        ssm_state = torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=state_dtype)
        return Mamba1State(conv_state.transpose(1, 2), ssm_state)

    def flops(self, n_tokens: int) -> int:
        layers = self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj
        weights = sum(layer.weight.numel() for layer in layers)
        return 2 * weights * n_tokens + selective_scan_flops(n_tokens, self.d_inner, self.d_state)

    def fused_rows(self) -> dict[str, list[int]]:
        operands = [self.dt_rank, self.d_state, self.d_state]
        return {"in_proj.weight": [self.d_inner, self.d_inner], "x_proj.weight": operands}

    def _forward(self, x: Tensor, state: Mamba1State | None, lengths: Tensor | None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)  # [B, T, I]
        conv_state, ssm_state = (None, None) if state is None else (state.conv_state, state.ssm_state)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        x, conv_state = self.operations["conv"](x, weight, bias, conv_state, "silu", lengths)
        dt, A, B, C, D = self._operands(x)
        y, ssm_state = self.operations["scan"](x, mask_padding(dt, lengths), A, B, C, D, ssm_state)
        if state is not None:
            state.conv_state.copy_(conv_state.detach())
            state.ssm_state.copy_(ssm_state.detach())
        return self.out_proj(y * F.silu(z))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dt, A, B, C, D of the scan from the convolution's output, with or without a T axis."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dtype = accumulation_dtype(x)
        dt = F.softplus(linear(dt, self.dt_proj.weight).to(dtype) + self.dt_proj.bias.to(dtype))
        A = -torch.exp(self.A_log.to(dtype))
        return dt, A, B, C, self.D
