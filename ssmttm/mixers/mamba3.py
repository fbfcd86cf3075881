"""Mamba-3 with one input and one output a head (Lahoti et al., arXiv 2603.15569): projection, scan, gate, projection.

Against Mamba-2: a trapezoidal rule for the input, decays that depend on the input, a complex state (B and C are
rotated), B and C normalised and with a bias per head, no short convolution. Parameter names, shapes and initial values
are those of mamba_ssm's `Mamba3` with `is_mimo=False`, so a state dict loads either way. Shapes: B batch, T positions,
D model width, I = expand * D inner width, H = I / headdim heads, G groups, N state, R = rope_fraction * N / 2 angles.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError, check_sizes
from ssmttm.mixers.base import Mixer, MixerState, check_divides, exclude_from_weight_decay, init_dt_bias
from ssmttm.ops.common import accumulation_dtype
from ssmttm.ops.linear import Linear
from ssmttm.ops.mamba3 import mamba3, mamba3_flops, mamba3_step

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # x, dt, A, B, C, trap, rate, D


@dataclass
class Mamba3State(MixerState):
    """angle_state [B, H, R], ssm_state [B, H, headdim, N], and the last rotated B and input: k_state [B, H, N], v_state
    [B, H, headdim]. All float32."""

    angle_state: Tensor
    ssm_state: Tensor
    k_state: Tensor
    v_state: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of `ssmttm.ops.mamba3`."""
        return self.angle_state, self.ssm_state, self.k_state, self.v_state


class NormThenGate(nn.Module):
    """RMSNorm(x) * silu(z), the norm over `groups` equal parts of the last axis, in float32."""

    def __init__(self, width: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        dtype = accumulation_dtype(x)
        parts = x.to(dtype).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight * F.silu(z.to(dtype))).to(x.dtype)


class Mamba3(Mixer):
    """The mixer. `chunk_size` changes only the speed of the scan.

    Args:
        rope_fraction: the fraction of the state that is rotated, 0.5 or 1.
        A_floor: the slowest decay, -A.
        is_outproj_norm: normalise each head's output before the gate.

    Raises:
        UserError: `headdim` does not divide the inner width, or `ngroups` the number of heads; `rope_fraction` is
            neither 0.5 nor 1; `d_state` is odd or below 4; a size below 1.
    """

    operations = {"scan": mamba3}

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(
            d_model=d_model, d_state=d_state, expand=expand, headdim=headdim, ngroups=ngroups, chunk_size=chunk_size
        )
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.A_floor, self.chunk_size = A_floor, chunk_size
        self.d_inner = expand * d_model
        check_divides("headdim", headdim, "expand * d_model", self.d_inner)
        self.nheads = self.d_inner // headdim
        check_divides("ngroups", ngroups, "the number of heads", self.nheads)
        if rope_fraction not in (0.5, 1):
            raise UserError(f"rope_fraction must be 0.5 or 1, got {rope_fraction}")
        self.n_angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or not self.n_angles:
            raise UserError(f"d_state must be even and large enough to rotate pairs (4 or more), got {d_state}")
        self.sizes = [self.d_inner, self.d_inner, *[ngroups * d_state] * 2, *[self.nheads] * 3, self.n_angles]
        self.in_proj = Linear(d_model, sum(self.sizes), bias=False)  # z, x, B, C, dt, A, trap, angle
        self.dt_bias = nn.Parameter(init_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = NormThenGate(self.d_inner, self.nheads) if is_outproj_norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        exclude_from_weight_decay(self.dt_bias, self.B_bias, self.C_bias, self.D)

    def _step(self, x: Tensor, state: Mamba3State) -> Tensor:
        z, operands = self._operands(self.in_proj(x))
        return self._out(mamba3_step(*operands, state.tensors()), z)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        device, dtype = self._device_and_dtype(device, dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        shapes = (self.n_angles,), (self.headdim, self.d_state), (self.d_state,), (self.headdim,)
        tensors = (torch.zeros(batch_size, self.nheads, *shape, device=device, dtype=dtype) for shape in shapes)
        return Mamba3State(*tensors)

    def flops(self, n_tokens: int) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * weights * n_tokens + mamba3_flops(n_tokens, self.nheads, self.headdim, self.d_state, self.chunk_size)

    def fused_rows(self) -> dict[str, list[int]]:
        return {"in_proj.weight": self.sizes}

    def _forward(self, x: Tensor, state: Mamba3State | None, lengths: Tensor | None) -> Tensor:
        z, operands = self._operands(self.in_proj(x))
        before = None if state is None else state.clone().tensors()  # the backward needs a copy of its own
        y, after = self.operations["scan"](*operands, before, lengths, self.chunk_size)
        if state is not None:
            for old, new in zip(state.tensors(), after, strict=True):
                old.copy_(new.detach())
        return self._out(y, z)

    def _operands(self, projected: Tensor) -> tuple[Tensor, Operands]:
        """z, and x, dt, A, B, C, trap, rate, D of the scan, with or without a T axis."""
        z, x, B, C, dt, A, trap, angle = projected.split(self.sizes, -1)
        dtype = accumulation_dtype(x)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        A = -F.softplus(A.to(dtype)).clamp(min=self.A_floor)
        B = self._by_head(B.to(dtype), self.B_norm, self.B_bias)
        C = self._by_head(C.to(dtype), self.C_norm, self.C_bias)
        rate = torch.pi * angle.to(dtype).tanh()
        return z, (x.unflatten(-1, (self.nheads, -1)), dt, A, B, C, trap.to(dtype).sigmoid(), rate, self.D)

    def _by_head(self, B: Tensor, norm: nn.RMSNorm, bias: Tensor) -> Tensor:
        """B [..., G * N], normalised, plus a bias per head [H, 1, N]: [..., H, N]."""
        groups = B.unflatten(-1, (self.ngroups, 1, self.d_state))
        normed = F.rms_norm(groups, (self.d_state,), norm.weight.to(B.dtype), norm.eps)
        return (normed + bias.to(B.dtype).view(self.ngroups, -1, self.d_state)).flatten(-3, -2)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """y [..., H, headdim], gated by z [..., I] and projected."""
        y = y.flatten(-2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))
