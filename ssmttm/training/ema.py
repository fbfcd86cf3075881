"""An exponential moving average of a module's weights, kept in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssmttm.training.parallel.sharding import local_part, part_of


class EMA:
    """`average = d * average + (1 - d) * weight` after every step, with d = min(decay, (1 + step) / (10 + step)).

    The ramp of d keeps early averages near the weights. Buffers are not averaged; `state_dict` is the
    complete state dict of the module, with the averages. Those of a sharded module are sharded likewise.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.averages = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after optimiser step `step` (the first is 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [local_part(parameter.detach()).float() for parameter in self.module.parameters()]
        torch._foreach_lerp_([local_part(average) for average in self.averages.values()], weights, 1 - decay)

    @torch.no_grad()
    def reset_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Set averages to the present weights, in the rows that have a new meaning: a mask by parameter name."""
        parameters = dict(self.module.named_parameters())
        for name, mask in rows.items():
            self.averages[name][mask] = parameters[name][mask].float()

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict() | self.averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """From whole tensors, also if the module is sharded."""
        for name, average in self.averages.items():
            local_part(average).copy_(part_of(state[name], average))

    @contextmanager
    @torch.no_grad()
    def average_weights(self) -> Iterator[None]:
        """Inside the `with` block the module holds the averages; its own weights are restored after it."""
        parameters = dict(self.module.named_parameters())
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
