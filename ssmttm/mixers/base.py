"""The interface of a mixer, and what every mixer shares.

A mixer maps a sequence [B, T, D] to one of the same shape, causally. Its state is all that the past leaves behind: with
a state, `forward` starts from it and leaves the final one in it, so a prefill is a forward; `step` takes one position.
States are updated in place and carry no gradient.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ssmttm.errors import UserError


class MixerState(Protocol):
    """What a mixer carries from one position to the next, as tensors whose first axis is the batch."""

    def clone(self) -> Self: ...

    def put(self, rows: slice, part: Self) -> None:
        """Copy the state `part`, of a smaller batch, into some rows."""


@dataclass
class TensorState:
    """The methods of a state that is a dataclass; its tensors are of fixed shape, the batch their first axis."""

    def clone(self) -> Self:
        return replace(self, **{name: tensor.clone() for name, tensor in self._tensors()})

    def put(self, rows: slice, part: Self) -> None:
        for name, tensor in self._tensors():
            tensor[rows].copy_(getattr(part, name))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


class Mixer(Protocol):
    """The interface; each mixer names its own state class."""

    def forward(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. `mask` [B, T] is True where a position is real; the others leave the state
        untouched, change no other output and give 0."""

    def step(self, x: Tensor, state: Any) -> Tensor:
        """x [B, D] -> [B, D], the state moved on by one position; without gradient."""

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """The state before the first position."""

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_tokens` positions (a multiply-add is two)."""


class UnpaddedRows:
    """Sequences with their masked positions moved behind the real ones, where a causal mixer cannot see them."""

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        if mask.shape != x.shape[:2]:
            raise ValueError(f"the mask has the shape {tuple(mask.shape)}, not {tuple(x.shape[:2])}")
        self.mask = mask
        self.order = torch.argsort(~mask, dim=1, stable=True)  # [B, T]
        self.lengths = mask.sum(1)  # [B]
        self.x = gather_positions(x.masked_fill(~mask[..., None], 0), self.order)

    def padding(self) -> Tensor:
        """[B, T], True behind the real positions of `x`."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) >= self.lengths[:, None]

    def restore(self, y: Tensor) -> Tensor:
        """Positions back in their places, 0 at the masked ones."""
        return gather_positions(y, self.order.argsort(1)).masked_fill(~self.mask[..., None], 0)


def gather_positions(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a sequence: x [B, T, D], index [B, S] -> [B, S, D]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, x.shape[-1])


def check_sizes(**sizes: int) -> None:
    """Raises UserError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} {size} is no size: give 1 or more")


def check_state(state_batch: int, batch: int) -> None:
    """Raises UserError when a state was made for another batch size."""
    if state_batch != batch:
        raise UserError(f"the state is for a batch of {state_batch}, the input of {batch}: call init_state({batch})")
