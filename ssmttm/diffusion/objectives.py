"""What a denoiser learns: how noise is mixed in at a time, and what is asked of the network there.

    v            variance preserving, cosine schedule (arXiv 2102.09672), v = a noise - s clean (arXiv 2202.00512)
    flow         rectified flow (arXiv 2209.03003): x = (1 - t) clean + t noise, velocity noise - clean
    regression   no diffusion: the clean latents themselves, from nothing; what a diffusion model has to beat

Time runs from 0, clean, to 1, noise. Shapes: B batch, C channels, T frames.
"""

from typing import Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ssmttm.errors import UserError

TRAIN_STEPS = 1_000  # of the discrete schedules
COSINE = {"num_train_timesteps": TRAIN_STEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


class Objective(Protocol):
    """clean, noise and prediction are [B, C, T], time is [B]."""

    def draw_times(self, n: int) -> Tensor:
        """Times of n training items, from torch's global generator on the CPU."""

    def noisy(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the network sees."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What it is to say."""

    def clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""


class VPrediction:
    """Times are whole steps of the schedule, as diffusers counts them: step n of 1,000 is n / 1,000."""

    def __init__(self) -> None:
        self._kept = DDPMScheduler(**COSINE).alphas_cumprod.double()  # [1000]

    def draw_times(self, n: int) -> Tensor:
        return torch.randint(TRAIN_STEPS, (n,)) / TRAIN_STEPS

    def noisy(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, spread = self._shares(time, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, spread = self._shares(time, clean)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        signal, spread = self._shares(time, noisy)
        return signal * noisy - spread * prediction

    def _shares(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the signal and what has come of noise, [B, 1, 1]."""
        step = (time.cpu() * TRAIN_STEPS).round().long().clamp(0, TRAIN_STEPS - 1)
        kept = self._kept[step].to(like.device)[:, None, None]
        return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)


class RectifiedFlow:
    """Straight lines from noise to data."""

    def draw_times(self, n: int) -> Tensor:
        return torch.rand(n)

    def noisy(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean.lerp(noise, time[:, None, None])

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise - clean

    def clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        return noisy - time[:, None, None] * prediction


class Regression:
    """The network sees zeros at time 1 and says the mean of what is likely."""

    def draw_times(self, n: int) -> Tensor:
        return torch.ones(n)

    def noisy(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(clean)

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean

    def clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        return prediction


OBJECTIVES: dict[str, type[Objective]] = {"v": VPrediction, "flow": RectifiedFlow, "regression": Regression}


def get_objective(name: str) -> Objective:
    """Raises UserError if there is none of that name."""
    if name not in OBJECTIVES:
        raise UserError(f"unknown diffusion.objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()
