"""Samplers: diffusers' schedulers around a prediction function, optionally with known frames (inpainting).

Shapes: B items, C channels, T frames, P known frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.diffusion.objectives import COSINE, TRAIN_STEPS, get_objective
from ssmttm.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy [B, C, T], time [B] -> prediction [B, C, T]

SAMPLERS = {
    "v": ("dpm_solver", "ddim", "ddpm"),
    "flow": ("euler", "heun", "dpm_solver"),
    "regression": ("direct",),
}  # by objective, the default first
_TRAILING = COSINE | {"timestep_spacing": "trailing"}  # starts at pure noise with few steps (arXiv 2305.08891)


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler and its number of steps.

    Raises:
        UserError: steps outside [1, 1000], or a sampler that the objective does not support.
    """

    objective: str
    sampler: str | None = None
    steps: int = 16

    def __post_init__(self) -> None:
        get_objective(self.objective)
        known = SAMPLERS[self.objective]
        if self.sampler is not None and self.sampler not in known:
            raise UserError(
                f"unknown sampler {self.sampler!r} for objective {self.objective}: choose from {', '.join(known)}"
            )
        if not isinstance(self.steps, int) or not 1 <= self.steps <= TRAIN_STEPS:
            raise UserError(f"sampling steps must be in [1, {TRAIN_STEPS}], got {self.steps}")

    @property
    def name(self) -> str:
        """The sampler, or the objective's default."""
        return self.sampler or SAMPLERS[self.objective][0]

    @property
    def n_evaluations(self) -> int:
        """Network evaluations per sample; every Heun step but the last needs two."""
        return {"direct": 1, "heun": 2 * self.steps - 1}.get(self.name, self.steps)


@torch.inference_mode()
def sample(
    predict: Predict,
    settings: SamplerSettings,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
) -> Tensor:
    """Sample from noise.

    Args:
        noise: [B, C, T].
        generators: one CPU generator per item, for samplers that add noise; an item's sample depends on its own only.
        known: [B, C, P], P <= T: fixed first frames; at every step they get the noise of that step's time.

    Returns:
        [B, C, T], float32.
    """
    objective = get_objective(settings.objective)
    batch, n_known = len(noise), 0 if known is None else known.shape[-1]
    x = noise.float()

    def with_known(x: Tensor, time: Tensor) -> Tensor:
        if known is None:
            return x
        return torch.cat([objective.add_noise(known, noise[..., :n_known], time), x[..., n_known:]], -1)

    if settings.name == "direct":
        time = torch.ones(batch, device=x.device)
        x = objective.predict_clean(x, predict(torch.zeros_like(x), time), time)
    else:
        scheduler = _scheduler(settings, x.device)
        extra: dict[str, Any] = {"generator": list(generators)} if settings.name == "ddpm" else {}
        # A flow's noise levels are its times; diffusers rounds some of its timesteps.
        times = scheduler.sigmas[:-1] if settings.objective == "flow" else scheduler.timesteps / TRAIN_STEPS
        for timestep, value in zip(scheduler.timesteps, times.tolist(), strict=True):
            time = torch.full((batch,), value, device=x.device)
            x = with_known(x, time)
            x = scheduler.step(predict(x, time).float(), timestep, x, **extra).prev_sample
    return x if known is None else torch.cat([known.to(x.dtype), x[..., n_known:]], -1)


def _scheduler(settings: SamplerSettings, device: torch.device) -> Any:
    """A diffusers scheduler with its timesteps set."""
    from diffusers import (  # slow to import, and one-stage models need none of it
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
    )

    name, steps = settings.name, settings.steps
    scheduler: Any
    if settings.objective == "v":
        scheduler = {
            "ddpm": lambda: DDPMScheduler(**_TRAILING, clip_sample=False),
            # first order is DDIM (arXiv 2211.01095); diffusers' DDIM is off in time unless steps divide 1,000
            "ddim": lambda: DPMSolverMultistepScheduler(**_TRAILING, solver_order=1),
            "dpm_solver": lambda: DPMSolverMultistepScheduler(**_TRAILING, solver_order=2),
        }[name]()
    elif name == "dpm_solver":
        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    elif name == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler()
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        return scheduler
    scheduler.set_timesteps(steps, device=device)
    return scheduler
