"""The base class of a mixer and of its state.

A mixer maps a sequence [B, T, D] to one of the same shape, causally. Its state summarises the past: with a state,
`forward` starts from it and leaves the final one in it, so prefill is `forward`; `step` takes one position. States are
updated in place and carry no gradient.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError


@dataclass
class MixerState:
    """A dataclass of tensors whose first axis is the batch."""

    @property
    def batch_size(self) -> int:
        return self._tensors()[0][1].shape[0]

    def clone(self) -> Self:
        return replace(self, **{name: tensor.clone() for name, tensor in self._tensors()})

    def write_rows(self, rows: slice, part: Self) -> None:
        """Copy `part`, the state of a smaller batch, into some rows."""
        for name, tensor in self._tensors():
            tensor[rows].copy_(getattr(part, name))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


class Mixer(nn.Module):
    """Checks of the state and unpadding; a subclass has `_forward`, `_step`, `init_state` and `flops`.

    Attributes:
        operations: what `_forward` calls over the whole sequence, by name: `scan` and, if it has one, `conv`. Those of
            one mixer may be replaced by others with the same results (`ssmttm.training.recompute`).
    """

    operations: Mapping[str, Callable[..., Any]] = {}

    def forward(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        Args:
            state: starts the sequence and takes the final state; None starts from `init_state` and keeps nothing.
            mask: [B, T], True at valid positions; the others leave the state unchanged, change no other output and
                give 0.

        Raises:
            UserError: the state has another batch size.
        """
        if state is not None:
            check_state(state.batch_size, x.shape[0])
        if mask is None:
            return self._forward(x, state, None)
        rows = UnpaddedRows(x, mask)
        return rows.restore(self._forward(rows.x, state, rows.lengths))

    @torch.no_grad()
    def step(self, x: Tensor, state: Any) -> Tensor:
        """One position, x [B, D] -> [B, D]; `state` is updated in place. Carries no gradient.

        Raises:
            UserError: the state has another batch size.
        """
        check_state(state.batch_size, x.shape[0])
        return self._step(x, state)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """The state before the first position; device and dtype (of the activations) default to the weights'."""
        raise NotImplementedError

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_tokens` positions, a multiply-add being two."""
        raise NotImplementedError

    def fused_rows(self) -> dict[str, list[int]]:
        """The heights of the row blocks of each weight that holds several projections, by its name."""
        return {}

    def _forward(self, x: Tensor, state: Any, lengths: Tensor | None) -> Tensor:
        """x [B, T, D]; `lengths` [B] is the number of valid leading positions of each row, None if all are valid."""
        raise NotImplementedError

    def _step(self, x: Tensor, state: Any) -> Tensor:
        raise NotImplementedError

    def _device_and_dtype(
        self, device: torch.device | None, dtype: torch.dtype | None
    ) -> tuple[torch.device, torch.dtype]:
        weight: Tensor = next(itertools.chain(self.parameters(), self.buffers()))  # int8 weights are buffers
        return device or weight.device, dtype or (weight.dtype if weight.is_floating_point() else torch.float32)


class UnpaddedRows:
    """Left-packed sequences: the masked positions are moved after the valid ones, where a causal mixer ignores them.

    Attributes:
        x: [B, T, D], 0 at the masked positions.
        lengths: valid positions of each row, [B].
    """

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")
        self.mask = mask
        self.order = torch.argsort(~mask, dim=1, stable=True)  # [B, T]
        self.lengths = mask.sum(1)  # [B]
        self.x = gather_positions(x.masked_fill(~mask[..., None], 0), self.order)

    def restore(self, y: Tensor) -> Tensor:
        """y [B, T, D] with its positions back in place, 0 at the masked ones."""
        return gather_positions(y, self.order.argsort(1)).masked_fill(~self.mask[..., None], 0)


def gather_positions(x: Tensor, index: Tensor) -> Tensor:
    """Positions of a sequence: x [B, T, D], index [B, S] -> [B, S, D]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, x.shape[-1])


def mask_padding(dt: Tensor, lengths: Tensor | None) -> Tensor:
    """dt [B, T, ...] set to 0 after the valid positions, where the state then does not change."""
    if lengths is None:
        return dt
    padding = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]  # [B, T]
    return dt.masked_fill(padding[..., None], 0)


def init_dt_bias(width: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """Biases [width] whose softplus is log-uniform in [dt_min, dt_max], and at least `floor`, as in mamba_ssm."""
    dt = torch.exp(torch.rand(width) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def exclude_from_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters as mamba_ssm does; `ssmttm.training.optim` reads the mark."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def check_divides(name: str, size: int, of: str, width: int) -> None:
    """Raises UserError if `width`, described by `of`, is not a multiple of `size`."""
    if width % size:
        raise UserError(f"{name} must divide {of} = {width}, got {size}")


def check_state(state_batch: int, batch: int) -> None:
    """Raises UserError if a state was made for another batch size."""
    if state_batch != batch:
        raise UserError(f"the state has batch size {state_batch}, the input {batch}: call init_state({batch})")
