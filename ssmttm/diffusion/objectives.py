"""Diffusion objectives: how noise is added at a time, and the network's prediction target.

    v            variance preserving, cosine schedule (arXiv 2102.09672), v = a noise - s clean (arXiv 2202.00512)
    flow         rectified flow (arXiv 2209.03003): x = (1 - t) clean + t noise, velocity noise - clean
    regression   no diffusion: predicts the clean latents from zeros; the baseline of the diffusion objectives

Time runs from 0, clean, to 1, noise. Shapes: B batch, C channels, T frames.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ssmttm.errors import UserError

TRAIN_STEPS = 1_000  # of the discrete schedules
COSINE = {"num_train_timesteps": TRAIN_STEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


class Objective(Protocol):
    """clean, noise and prediction are [B, C, T], time is [B]."""

    def training_times(self, uniform: Tensor) -> Tensor:
        """Training times of items from uniform numbers in [0, 1), [B]."""

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The network's input."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The network's prediction target."""

    def predict_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """The clean latents that follow from a prediction."""


class VPrediction:
    """Velocity prediction. Times are steps of diffusers' schedule: step n of 1,000 is time n / 1,000."""

    def __init__(self) -> None:
        from diffusers import DDPMScheduler  # slow to import

        schedule: Any = DDPMScheduler(**COSINE)
        self._alphas_cumprod = schedule.alphas_cumprod.double()  # [1000]

    def training_times(self, uniform: Tensor) -> Tensor:
        return (uniform * TRAIN_STEPS).floor() / TRAIN_STEPS

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, sigma = self._scales(time, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, sigma = self._scales(time, clean)
        return signal * noise - sigma * clean

    def predict_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        signal, sigma = self._scales(time, noisy)
        return signal * noisy - sigma * prediction

    def _scales(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the signal and of the noise, [B, 1, 1]."""
        self._alphas_cumprod = self._alphas_cumprod.to(time.device)  # copied once
        step = (time * TRAIN_STEPS).round().long().clamp(0, TRAIN_STEPS - 1)
        alpha = self._alphas_cumprod[step][:, None, None]
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)


class RectifiedFlow:
    """Straight lines from noise to data."""

    def training_times(self, uniform: Tensor) -> Tensor:
        return uniform

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean.lerp(noise, time[:, None, None])

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise - clean

    def predict_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        return noisy - time[:, None, None] * prediction


class Regression:
    """The network gets zeros at time 1 and predicts the conditional mean."""

    def training_times(self, uniform: Tensor) -> Tensor:
        return torch.ones_like(uniform)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(clean)

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean

    def predict_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        return prediction


OBJECTIVES: dict[str, type[Objective]] = {"v": VPrediction, "flow": RectifiedFlow, "regression": Regression}


def get_objective(name: str) -> Objective:
    """Raises UserError if the name is unknown."""
    if name not in OBJECTIVES:
        raise UserError(f"unknown diffusion.objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()
