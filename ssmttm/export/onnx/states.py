"""The state of a model as named tensors: what goes into a step's graph and comes out of it.

A name says where a tensor belongs, such as `block0.branch1.ssm_state`. Complex states are pairs of real numbers there.
Shapes: B batch, S slots of a cache, H heads, P head width.
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
# Axes besides the batch whose lengths differ from call to call: of attention's cache, of cross-attention's keys.
FREE_AXES = {
    "keys": {1: "cached"},
    "values": {1: "cached"},
    "k": {2: "tokens"},
    "v": {2: "tokens"},
    "mask": {1: "tokens"},
}


@dataclass
class GrowingCache(AttentionState):
    """A cache of as many slots as its longest row has positions, none at first: each step adds one."""

    def append(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Take in one position, [B, 1, H, P]."""
        here = torch.arange(self.keys.shape[1] + 1) == self.lengths[:, None]  # [B, S + 1]
        self.keys, self.values = (
            torch.where(here[..., None, None], new, F.pad(cache, (0, 0, 0, 0, 0, 1)))
            for cache, new in ((self.keys, keys), (self.values, values))
        )
        self.lengths = self.lengths + 1

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, torch.arange(self.keys.shape[1]) < self.lengths[:, None]


def growing(blocks: Blocks) -> Blocks:
    """The same states, with caches that grow in the place of attention's."""
    other = _copied(blocks)
    for _, sublayer in _places(other):
        if isinstance(sublayer.inner, AttentionState):
            sublayer.inner = GrowingCache(sublayer.inner.keys, sublayer.inner.values, sublayer.inner.lengths)
    return other


def named(blocks: Blocks) -> dict[str, Tensor]:
    """All tensors, by name."""
    return {
        f"{place}.{field}": torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for place, sublayer in _places(blocks)
        for field, tensor in _fields(sublayer).items()
    }


def refilled(blocks: Blocks, tensors: Mapping[str, Tensor]) -> Blocks:
    """The same states with copies of other tensors, by name."""
    other = _copied(blocks)
    for place, sublayer in _places(other):
        for field, old in _fields(sublayer).items():
            new = tensors[f"{place}.{field}"].clone()
            new = torch.view_as_complex(new) if old.is_complex() else new
            setattr(sublayer if field == "adaln" else sublayer.inner, field, new)
    return other


def _copied(blocks: Blocks) -> Blocks:
    return [[replace(sublayer, inner=copy(sublayer.inner)) for sublayer in sublayers] for sublayers in blocks]


def _places(blocks: Blocks) -> Iterator[tuple[str, SublayerState]]:
    for b, sublayers in enumerate(blocks):
        for n, sublayer in enumerate(sublayers):
            yield f"block{b}.branch{n}", sublayer


def _fields(sublayer: SublayerState) -> dict[str, Tensor]:
    parts = {**(vars(sublayer.inner) if sublayer.inner is not None else {}), "adaln": sublayer.adaln}
    return {field: part for field, part in parts.items() if isinstance(part, Tensor)}
