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
    known_after: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Sample from noise, or from noised latents.

    Args:
        noise: [B, C, T].
        generators: one CPU generator per item, for samplers that add noise; an item's sample depends on its own only.
        known, known_after: [B, C, P] and [B, C, Q], fixed first and last frames; at every step they get the noise of
            that step's time.
        start: [B, C, T], latents that sampling starts from at a `strength` in (0, 1]: noise is added to them and the
            last `strength` of the steps are made, as in diffusers' image-to-image pipelines. 1 is sampling from noise.

    Returns:
        [B, C, T], float32.

    Raises:
        UserError: the strength is out of its range, or so low that no step is left.
    """
    objective = get_objective(settings.objective)
    batch, length = noise.shape[0], noise.shape[-1]
    n_before = 0 if known is None else known.shape[-1]
    first_after = length - (0 if known_after is None else known_after.shape[-1])
    x = noise.float()

    def with_known(x: Tensor, time: Tensor | None) -> Tensor:
        """x with the known frames, noised for a time."""
        parts = [x[..., n_before:first_after]]
        for latents, frames in ((known, slice(0, n_before)), (known_after, slice(first_after, length))):
            if latents is None:
                continue
            noised = latents.to(x.dtype) if time is None else objective.add_noise(latents, noise[..., frames], time)
            parts.insert(0 if latents is known else len(parts), noised)
        return torch.cat(parts, -1)

    if settings.name == "direct":
        if start is not None:
            raise UserError("objective regression has no steps, so there is no strength: leave it out, or at 1")
        time = torch.ones(batch, device=x.device)
        x = objective.predict_clean(x, predict(torch.zeros_like(x), time), time)
    else:
        scheduler = _scheduler(settings, x.device)
        extra: dict[str, Any] = {"generator": list(generators)} if settings.name == "ddpm" else {}
        # A flow's noise levels are its times; diffusers rounds some of its timesteps.
        times = scheduler.sigmas[:-1] if settings.objective == "flow" else scheduler.timesteps / TRAIN_STEPS
        first = _first_step(settings, strength) * scheduler.order
        timesteps, times = scheduler.timesteps[first:], times[first:]
        if start is not None and first:
            if hasattr(scheduler, "set_begin_index"):  # DDPM keeps no index
                scheduler.set_begin_index(first)
            x = objective.add_noise(start.float(), x, times[:1].to(x.device).expand(batch))
        for timestep, value in zip(timesteps, times.tolist(), strict=True):
            time = torch.full((batch,), value, device=x.device)
            x = with_known(x, time)
            x = scheduler.step(predict(x, time).float(), timestep, x, **extra).prev_sample
    return with_known(x, None)


def _first_step(settings: SamplerSettings, strength: float) -> int:
    """The step that sampling starts at."""
    if not 0 < strength <= 1:
        raise UserError(f"strength must be in (0, 1] (1: nothing is kept of what it starts from), got {strength}")
    n_steps = min(int(settings.steps * strength), settings.steps)
    if n_steps == 0:
        raise UserError(f"a strength of {strength:g} leaves none of {settings.steps} steps: give more of either")
    return settings.steps - n_steps


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
