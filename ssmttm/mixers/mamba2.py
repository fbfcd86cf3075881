"""Mamba-2 (Dao and Gu, arXiv 2405.21060): projection, short convolution, SSD, gated norm, projection.

Parameter names, shapes and initial values are those of mamba_ssm's `Mamba2`, so a state dict loads either way.
Shapes: B batch, T positions, D model width, I = expand * D inner width, H = I / headdim heads, G groups, N state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import check_sizes
from ssmttm.mixers.base import (
    Mixer,
    MixerState,
    check_divides,
    exclude_from_weight_decay,
    init_dt_bias,
    mask_padding,
)
from ssmttm.ops.common import accumulation_dtype
from ssmttm.ops.conv import causal_conv, causal_conv_step
from ssmttm.ops.linear import Linear
from ssmttm.ops.norm import GatedRMSNormFunction
from ssmttm.ops.ssd import ssd, ssd_flops, ssd_step


@dataclass
class Mamba2State(MixerState):
    """conv_state [B, I + 2GN, d_conv - 1]: the convolution's last inputs; ssm_state [B, H, headdim, N], float32."""

    conv_state: Tensor
    ssm_state: Tensor


class GatedRMSNorm(nn.Module):
    """RMSNorm(x * silu(z)) over `groups` equal parts of the last axis, in float32 (`norm_before_gate=False`)."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        trains_on_cpu = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains_on_cpu and self.groups == 1:
            rows = x.flatten(0, -2), z.flatten(0, -2)  # [R, D]
            return GatedRMSNormFunction.apply(*rows, self.weight, self.eps).view(x.shape)
        dtype = x.dtype
        if dtype in (torch.bfloat16, torch.float16):
            x, z = x.float(), z.float()
        gated = (x * F.silu(z)).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(dtype)


class Mamba2(Mixer):
    """The mixer. `chunk_size` changes only the speed of the scan.

    Raises:
        UserError: `headdim` does not divide the inner width, or `ngroups` the number of heads; a size below 1.
    """

    operations = {"conv": causal_conv, "scan": ssd}

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(
            d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups,
            chunk_size=chunk_size,
        )  # fmt: skip
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.chunk_size = chunk_size
        self.d_inner = expand * d_model
        check_divides("headdim", headdim, "expand * d_model", self.d_inner)
        self.nheads = self.d_inner // headdim
        check_divides("ngroups", ngroups, "the number of heads", self.nheads)
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=bias)  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias
        )
        self.dt_bias = nn.Parameter(init_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        exclude_from_weight_decay(self.dt_bias, self.A_log, self.D)

    def _step(self, x: Tensor, state: Mamba2State) -> Tensor:
        z, xBC, dt = self._project(x)
        xBC = causal_conv_step(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, state.conv_state, "silu")
        y = ssd_step(*self._operands(xBC, dt), state.ssm_state)
        return self.out_proj(self.norm(y.flatten(1), z))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        device, dtype = self._device_and_dtype(device, dtype)
        conv_state = torch.zeros(batch_size, self.d_conv - 1, self.conv_dim, device=device, dtype=dtype)
        shape = batch_size, self.nheads, self.headdim, self.d_state
        ssm_state = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return Mamba2State(conv_state.transpose(1, 2), ssm_state)

    def flops(self, n_tokens: int) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        sizes = self.nheads, self.headdim, self.ngroups, self.d_state
        return 2 * weights * n_tokens + ssd_flops(n_tokens, *sizes, self.chunk_size)

    def fused_rows(self) -> dict[str, list[int]]:
        state = self.ngroups * self.d_state
        return {"in_proj.weight": [self.d_inner, self.d_inner, state, state, self.nheads]}

    def _forward(self, x: Tensor, state: Mamba2State | None, lengths: Tensor | None) -> Tensor:
        z, xBC, dt = self._project(x)
        conv_state, ssm_state = (None, None) if state is None else (state.conv_state, state.ssm_state)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC, conv_state = self.operations["conv"](xBC, weight, bias, conv_state, "silu", lengths)
        x, dt, A, B, C, D = self._operands(xBC, dt)
        y, ssm_state = self.operations["scan"](x, mask_padding(dt, lengths), A, B, C, D, ssm_state, self.chunk_size)
        if state is not None:
            state.conv_state.copy_(conv_state.detach())
            state.ssm_state.copy_(ssm_state.detach())
        return self.out_proj(self.norm(y.flatten(2), z))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([self.d_inner, self.conv_dim, self.nheads], -1)

    def _operands(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, dt, A, B, C, D of the scan from the convolution's output and the raw dt, with or without a T axis."""
        x, B, C = xBC.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], -1)
        dtype = accumulation_dtype(dt)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        A = -torch.exp(self.A_log.to(dtype))
        heads, groups = (self.nheads, self.headdim), (self.ngroups, self.d_state)
        return x.unflatten(-1, heads), dt, A, B.unflatten(-1, groups), C.unflatten(-1, groups), self.D
