"""Mamba-3 with one input and one output a head (Lahoti et al., arXiv 2603.15569): projection, scan, gate, projection.

Against Mamba-2: a trapezoidal rule for the input, decays that depend on it, a complex state (B and C turn), B and C
normalised and with a bias for each head, and no short convolution. Parameter names, shapes and initial values are those
of mamba_ssm's `Mamba3` with `is_mimo=False`, so a state dict loads either way. Shapes: B batch, T positions, D model
width, I = expand * D inner width, H = I / headdim heads, G groups, N state, R = rope_fraction * N / 2 angles.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers.base import TensorState, UnpaddedRows, check_sizes, check_state
from ssmttm.ops.linear import Linear
from ssmttm.ops.mamba3 import mamba3, mamba3_flops, mamba3_step


@dataclass
class Mamba3State(TensorState):
    """angle_state [B, H, R], ssm_state [B, H, headdim, N], and the last turned B and input: k_state [B, H, N], v_state
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
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(wide).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight * F.silu(z.to(wide))).to(x.dtype)


class Mamba3(nn.Module):
    """The mixer. `chunk_size` sets only the speed of the scan.

    Args:
        rope_fraction: the part of the state that turns, 0.5 or 1.
        A_floor: the slowest decay, -A.
        is_outproj_norm: normalise each head's output before the gate.

    Raises:
        UserError: `headdim` does not divide the inner width, or `ngroups` the number of heads; `rope_fraction` is
            neither 0.5 nor 1; `d_state` is odd or too small to turn; a size below 1.
    """

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
        if self.d_inner % headdim:
            raise UserError(f"headdim {headdim} does not divide expand * d_model = {self.d_inner}: choose a divisor")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise UserError(f"ngroups {ngroups} does not divide the {self.nheads} heads: choose a divisor")
        if rope_fraction not in (0.5, 1):
            raise UserError(f"rope_fraction is 0.5 or 1, not {rope_fraction}")
        self.n_angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or not self.n_angles:
            raise UserError(f"d_state {d_state} has no pairs to turn: choose an even one, of 4 or more")
        self.sizes = [self.d_inner, self.d_inner, *[ngroups * d_state] * 2, *[self.nheads] * 3, self.n_angles]
        self.in_proj = Linear(d_model, sum(self.sizes), bias=False)  # z, x, B, C, dt, A, trap, angle
        dt = torch.exp(torch.rand(self.nheads) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.B_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state))
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = NormThenGate(self.d_inner, self.nheads) if is_outproj_norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.dt_bias, self.B_bias, self.C_bias, self.D):
            parameter._no_weight_decay = True

    def forward(self, x: Tensor, state: Mamba3State | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `state` and `mask` [B, T] as in `ssmttm.mixers.base`.

        Raises:
            UserError: the state is of another batch size.
        """
        if state is not None:
            check_state(state.ssm_state.shape[0], x.shape[0])
        if mask is None:
            return self._scan(x, state, None)
        compacted = UnpaddedRows(x, mask)
        return compacted.restore(self._scan(compacted.x, state, compacted.lengths))

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba3State) -> Tensor:
        """One position, x [B, D] -> [B, D]; `state` is updated in place. Carries no gradient.

        Raises:
            UserError: the state is of another batch size.
        """
        check_state(state.ssm_state.shape[0], x.shape[0])
        z, operands = self._operands(self.in_proj(x))
        return self._out(mamba3_step(*operands, state.tensors()), z)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        """The state before the first position: zeros. `dtype` is that of the activations (default: of the weights)."""
        weight = self.in_proj.weight
        wide = torch.float64 if (dtype or weight.dtype) == torch.float64 else torch.float32
        widths = (self.n_angles,), (self.headdim, self.d_state), (self.d_state,), (self.headdim,)
        return Mamba3State(
            *(torch.zeros(batch_size, self.nheads, *w, device=device or weight.device, dtype=wide) for w in widths)
        )

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_tokens` positions: projections and scan."""
        linear = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * linear * n_tokens + mamba3_flops(n_tokens, self.nheads, self.headdim, self.d_state, self.chunk_size)

    def _scan(self, x: Tensor, state: Mamba3State | None, lengths: Tensor | None) -> Tensor:
        """x [B, T, D]; of each row, the `lengths` [B] first positions are real."""
        z, operands = self._operands(self.in_proj(x))
        before = None if state is None else state.clone().tensors()  # the backward pass needs what is overwritten here
        y, after = mamba3(*operands, before, lengths, self.chunk_size)
        if state is not None:
            for old, new in zip(state.tensors(), after, strict=True):
                old.copy_(new.detach())
        return self._out(y, z)

    def _operands(self, projected: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """z, and x, dt, A, B, C, trap, rate, D of the scan, with or without a T axis."""
        z, x, B, C, dt, A, trap, angle = projected.split(self.sizes, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        A = -F.softplus(A.to(wide)).clamp(min=self.A_floor)
        B, C = self._by_head(B.to(wide), self.B_norm, self.B_bias), self._by_head(C.to(wide), self.C_norm, self.C_bias)
        rate = torch.pi * angle.to(wide).tanh()
        return z, (x.unflatten(-1, (self.nheads, -1)), dt, A, B, C, trap.to(wide).sigmoid(), rate, self.D)

    def _by_head(self, B: Tensor, norm: nn.RMSNorm, bias: Tensor) -> Tensor:
        """B [..., G * N], normalised, plus a bias a head [H, 1, N]: [..., H, N]."""
        groups = B.unflatten(-1, (self.ngroups, 1, self.d_state))
        normed = F.rms_norm(groups, (self.d_state,), norm.weight.to(B.dtype), norm.eps)
        return (normed + bias.to(B.dtype).view(self.ngroups, -1, self.d_state)).flatten(-3, -2)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """y [..., H, headdim], gated by z [..., I] and projected."""
        y = y.flatten(-2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))
