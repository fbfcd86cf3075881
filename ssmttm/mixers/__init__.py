"""Sequence mixers behind one interface, see `ssmttm.mixers.base`."""

from typing import Any

from ssmttm.errors import UserError
from ssmttm.mixers.base import Mixer, MixerState
from ssmttm.mixers.mamba2 import Mamba2, Mamba2State

MIXERS: dict[str, type] = {"mamba2": Mamba2}

__all__ = ["MIXERS", "Mamba2", "Mamba2State", "Mixer", "MixerState", "build_mixer"]


def build_mixer(name: str, d_model: int, **options: Any) -> Mixer:
    """The mixer called `name`, with the keyword arguments of its class.

    Raises:
        UserError: no mixer has that name.
    """
    if name not in MIXERS:
        raise UserError(f"unknown layer {name!r} in model.layers: choose from {', '.join(MIXERS)}")
    return MIXERS[name](d_model, **options)
