"""S4D (Gu, Gupta, Goel and Ré, arXiv 2206.11893): a diagonal time-invariant state space, GELU, projection, GLU.

With `expand` 1 this is the layer of the paper; with a larger one, a projection to the inner width comes first.
Names and shapes of the system's parameters are those of the authors' minimal S4D. A = -exp(log_A_real) + i A_imag.
Shapes: B batch, T positions, D model width, I = expand * D inner width, M = N/2 modes (conjugate pairs).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError, check_sizes
from ssmttm.mixers.base import Mixer, MixerState, exclude_from_weight_decay
from ssmttm.ops.linear import Linear
from ssmttm.ops.s4d import discretise, s4d_final_state, s4d_flops, s4d_outputs, s4d_step

INITS = ("lin", "inv")


@dataclass
class S4DState(MixerState):
    """ssm_state [B, I, N/2], complex64. `system` is the discretised system, cached by the first step."""

    ssm_state: Tensor
    system: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class S4D(Mixer):
    """The mixer. `init` sets the initial frequencies: "lin" (S4D-Lin) or "inv" (S4D-Inv).

    Raises:
        UserError: `d_state` is odd, `init` unknown, or a size below 1.
    """

    operations = {"scan": s4d_outputs}

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        expand: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        init: str = "lin",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, expand=expand)
        if d_state % 2:
            raise UserError(f"S4D keeps conjugate pairs: d_state must be even, got {d_state}")
        if init not in INITS:
            raise UserError(f"unknown S4D init {init!r}: choose from {', '.join(INITS)}")
        self.d_model, self.d_state, self.d_inner = d_model, d_state, expand * d_model
        modes = self.d_inner, d_state // 2
        self.in_proj = Linear(d_model, self.d_inner, bias=bias) if expand > 1 else nn.Identity()
        self.log_dt = nn.Parameter(torch.rand(self.d_inner) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.log_A_real = nn.Parameter(torch.full(modes, math.log(0.5)))
        self.A_imag = nn.Parameter(_frequencies(init, d_state).repeat(self.d_inner, 1))
        self.C = nn.Parameter(torch.randn(*modes, 2) * 0.5**0.5)  # real and imaginary parts
        self.D = nn.Parameter(torch.randn(self.d_inner))
        self.out_proj = Linear(self.d_inner, 2 * d_model, bias=bias)
        exclude_from_weight_decay(self.log_dt, self.log_A_real, self.A_imag, self.C, self.D)

    def _step(self, x: Tensor, state: S4DState) -> Tensor:
        if state.system is None:
            dt, A, C, D = self._system(state.ssm_state.dtype)
            state.system = *discretise(dt, A), C, D
        return self._mix(s4d_step(self.in_proj(x), *state.system, state.ssm_state))

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        device, dtype = self._device_and_dtype(device, dtype)
        shape = batch_size, self.d_inner, self.d_state // 2
        return S4DState(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.complex64)))

    def flops(self, n_tokens: int) -> int:
        weights = sum(module.weight.numel() for module in self.children() if isinstance(module, nn.Linear))
        return 2 * weights * n_tokens + s4d_flops(n_tokens, self.d_inner, self.d_state)

    def _forward(self, x: Tensor, state: S4DState | None, lengths: Tensor | None) -> Tensor:
        x = self.in_proj(x)  # [B, T, I]
        dt, A, C, D = self._system(torch.promote_types(x.dtype, torch.complex64))
        y = self.operations["scan"](x, dt, A, C, D, None if state is None else state.ssm_state.clone())
        if state is not None:
            with torch.no_grad():
                state.ssm_state.copy_(s4d_final_state(x, dt, A, state.ssm_state, lengths))
            state.system = None
        return self._mix(y)

    def _mix(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), -1)

    def _system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt [I], A and C [I, M] of the complex `dtype`, D [I]."""
        real = dtype.to_real()
        A = torch.complex(-self.log_A_real.to(real).exp(), self.A_imag.to(real))
        return self.log_dt.to(real).exp(), A, torch.view_as_complex(self.C.to(real)), self.D.to(real)


def _frequencies(init: str, d_state: int) -> Tensor:
    """The imaginary parts of A, [N/2]: those of S4D-Lin or of S4D-Inv."""
    n = torch.arange(d_state // 2)
    return math.pi * n if init == "lin" else d_state / math.pi * (d_state / (2 * n + 1) - 1)
