"""Steps without an update: those with a loss or gradient that is not finite, or is far above the recent ones.

Everything is computed on the device, from losses that are summed over ranks and gradient norms that all ranks share.
So all ranks skip the same steps, and the loop does not wait for the device. The outliers are those of OLMo-core's
SkipStepOptimizer: more than `sigma` standard deviations above the mean of the last WINDOW steps, for the model's loss
or gradient norm.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # steps; outliers are skipped once half of it is filled


class SkipStep:
    """Decides which steps are skipped, and counts them.

    Args:
        device: of the losses.
        sigma: None: only values that are not finite are skipped.
    """

    def __init__(self, device: torch.device, sigma: float | None) -> None:
        self._sigma = sigma
        self._counts = torch.zeros(2, device=device)  # skipped steps, those in a row until now
        self._recent = torch.zeros(2, WINDOW, device=device)  # losses and gradient norms of steps that were finite
        self._seen = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def check(self, values: Mapping[str, Tensor]) -> Tensor:
        """1.0 if the step must be skipped, else 0.0, a scalar on the device.

        Args:
            values: losses and gradient norms of the step, with `loss` and `grad_norm` of the model.
        """
        skip = ~torch.stack(list(values.values())).isfinite().all()
        if self._sigma is not None:
            observed = torch.stack([values["loss"], values["grad_norm"]]).float()
            skip = skip | self._is_outlier(observed, ~skip, self._sigma)
        skipped = skip.float()
        total, in_a_row = self._counts.unbind()
        self._counts = torch.stack([total + skipped, (in_a_row + 1) * skipped])
        return skipped

    def counts(self) -> tuple[int, int]:
        """Skipped steps, and how many of them in a row until now. Waits for the device."""
        total, in_a_row = self._counts.tolist()
        return int(total), int(in_a_row)

    def start_again(self) -> None:
        """Clear the statistics of recent steps, but not the number of skipped ones."""
        self._counts[1] = 0
        self._seen.zero_()

    def state(self) -> dict[str, Any]:
        """As JSON; exact."""
        return {"counts": self._counts.tolist(), "recent": self._recent.tolist(), "seen": int(self._seen)}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self._counts.copy_(torch.tensor(state["counts"]))
        self._recent.copy_(torch.tensor(state["recent"]))
        self._seen.fill_(state["seen"])

    def _is_outlier(self, values: Tensor, is_finite: Tensor, sigma: float) -> Tensor:
        """Whether one of the values [2] is an outlier. Finite ones become recent ones, at most as high as the limit, so
        that the window follows a lasting change."""
        count = self._seen.clamp(max=WINDOW)  # [1]
        filled = torch.arange(WINDOW, device=values.device) < count  # [W]
        mean = (self._recent * filled).sum(1) / count.clamp(min=1)  # [2]
        variance = ((self._recent - mean[:, None]).square() * filled).sum(1) / (count - 1).clamp(min=1)
        limit = torch.where(count < WINDOW // 2, torch.inf, mean + sigma * variance.sqrt())  # [2]
        slot = self._seen % WINDOW  # [1]
        kept = torch.where(is_finite, torch.minimum(values, limit), self._recent.gather(1, slot.expand(2, 1))[:, 0])
        self._recent.scatter_(1, slot.expand(2, 1), kept[:, None])
        self._seen += is_finite
        return (values > limit).any()
