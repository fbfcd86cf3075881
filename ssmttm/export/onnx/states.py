"""The state of a model as named tensors: inputs and outputs of the step graph.

Names such as `block0.branch1.ssm_state`; complex states are pairs of real numbers.
Shapes: B batch, S entries of a cache, H heads, P head width.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.mixers.attention import AttentionState
from ssmttm.models.blocks import SublayerState

Blocks = list[list[SublayerState]]
# Axes of variable length besides the batch: of the attention cache and of cross-attention keys.
FREE_AXES = {
    "keys": {1: "cached"}, "values": {1: "cached"}, "k": {2: "tokens"}, "v": {2: "tokens"}, "mask": {1: "tokens"},
}  # fmt: skip


@dataclass
class GrowingCache(AttentionState):
    """A cache with as many entries as its longest row, empty at first: each step appends one."""

    def append(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Append one position, [B, 1, H, P]."""
        here = torch.arange(self.keys.shape[1] + 1) == self.lengths[:, None]  # [B, S + 1]
        self.keys, self.values = (
            torch.where(here[..., None, None], new, F.pad(cache, (0, 0, 0, 0, 0, 1)))
            for cache, new in ((self.keys, keys), (self.values, values))
        )
        self.lengths = self.lengths + 1

    def valid_entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, torch.arange(self.keys.shape[1]) < self.lengths[:, None]


def with_growing_caches(blocks: Blocks) -> Blocks:
    """The same states, with growing caches for attention."""
    copied = _copy(blocks)
    for _, sublayer in _named_sublayers(copied):
        if isinstance(sublayer.inner, AttentionState):
            sublayer.inner = GrowingCache(sublayer.inner.keys, sublayer.inner.values, sublayer.inner.lengths)
    return copied


def named_tensors(blocks: Blocks) -> dict[str, Tensor]:
    """All tensors by name."""
    return {
        f"{prefix}.{field}": torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for prefix, sublayer in _named_sublayers(blocks)
        for field, tensor in _fields(sublayer).items()
    }


def with_tensors(blocks: Blocks, tensors: Mapping[str, Tensor]) -> Blocks:
    """The same states with copies of the given tensors, by name."""
    copied = _copy(blocks)
    for prefix, sublayer in _named_sublayers(copied):
        for field, current in _fields(sublayer).items():
            new = tensors[f"{prefix}.{field}"].clone()
            new = torch.view_as_complex(new) if current.is_complex() else new
            setattr(sublayer if field == "adaln" else sublayer.inner, field, new)
    return copied


def _copy(blocks: Blocks) -> Blocks:
    return [[replace(sublayer, inner=copy(sublayer.inner)) for sublayer in sublayers] for sublayers in blocks]


def _named_sublayers(blocks: Blocks) -> Iterator[tuple[str, SublayerState]]:
    for block, sublayers in enumerate(blocks):
        for index, sublayer in enumerate(sublayers):
            yield f"block{block}.branch{index}", sublayer


def _fields(sublayer: SublayerState) -> dict[str, Tensor]:
    fields = {**(vars(sublayer.inner) if sublayer.inner is not None else {}), "adaln": sublayer.adaln}
    return {field: value for field, value in fields.items() if isinstance(value, Tensor)}
