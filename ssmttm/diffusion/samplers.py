"""Drawing samples: diffusers' schedulers around a function that predicts, with frames that are known beforehand.

Shapes: B items, C channels, T frames, P frames known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from ssmttm.diffusion.objectives import COSINE, TRAIN_STEPS, get_objective
from ssmttm.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy [B, C, T], time [B] -> prediction [B, C, T]

SAMPLERS = {
    "v": ("dpm_solver", "ddim", "ddpm"),
    "flow": ("euler", "heun", "dpm_solver"),
    "regression": ("direct",),
}  # by objective, its default first
_TRAILING = COSINE | {"timestep_spacing": "trailing"}  # few steps begin at pure noise (arXiv 2305.08891)


@dataclass(frozen=True)
class SamplerSettings:
    """Which scheduler and how many of its steps; a Heun step but the last asks the network twice.

    Raises:
        UserError: fewer steps than one or more than training's, or a sampler that the objective does not have.
    """

    objective: str
    sampler: str | None = None
    steps: int = 16

    def __post_init__(self) -> None:
        get_objective(self.objective)
        known = SAMPLERS[self.objective]
        if self.sampler is not None and self.sampler not in known:
            raise UserError(f"no sampler {self.sampler!r} for objective {self.objective}: choose {', '.join(known)}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= TRAIN_STEPS:
            raise UserError(f"{self.steps} sampling steps: give 1 to {TRAIN_STEPS:,}")

    @property
    def name(self) -> str:
        """The sampler, or the objective's default."""
        return self.sampler or SAMPLERS[self.objective][0]

    @property
    def evaluations(self) -> int:
        """How often the network is asked."""
        return {"direct": 1, "heun": 2 * self.steps - 1}.get(self.name, self.steps)


@torch.inference_mode()
def sample(
    predict: Predict,
    settings: SamplerSettings,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
) -> Tensor:
    """Turn noise into a sample.

    Args:
        noise: [B, C, T].
        generators: one an item, on the CPU, for samplers that add noise on the way; an item's sample depends on its
            own only.
        known: [B, C, P], P <= T: the first frames of the sample; at every time they are given the noise of that time.

    Returns:
        [B, C, T], float32.
    """
    objective = get_objective(settings.objective)
    batch, n_known = len(noise), 0 if known is None else known.shape[-1]
    x = noise.float()

    def with_known(x: Tensor, time: Tensor) -> Tensor:
        if not n_known:
            return x
        return torch.cat([objective.noisy(known, noise[..., :n_known], time), x[..., n_known:]], -1)

    if settings.name == "direct":
        time = torch.ones(batch, device=x.device)
        x = objective.clean(x, predict(torch.zeros_like(x), time), time)
    else:
        scheduler = _scheduler(settings, x.device)
        extra: dict[str, Any] = {"generator": list(generators)} if settings.name == "ddpm" else {}
        # A flow's noise levels are its times; diffusers rounds some of its timesteps, which are but their names.
        times = scheduler.sigmas[:-1] if settings.objective == "flow" else scheduler.timesteps / TRAIN_STEPS
        for timestep, now in zip(scheduler.timesteps, times.tolist(), strict=True):
            time = torch.full((batch,), now, device=x.device)
            x = with_known(x, time)
            x = scheduler.step(predict(x, time).float(), timestep, x, **extra).prev_sample
    return x if not n_known else torch.cat([known.to(x.dtype), x[..., n_known:]], -1)


def _scheduler(settings: SamplerSettings, device: torch.device) -> Any:
    """A diffusers scheduler with its times set."""
    name, steps = settings.name, settings.steps
    if settings.objective == "v":
        scheduler = {
            "ddpm": lambda: DDPMScheduler(**_TRAILING, clip_sample=False),
            # of first order it is DDIM (arXiv 2211.01095); diffusers' own misses its times unless steps divide 1,000
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
