"""Sequence mixers behind one interface, see `ssmttm.mixers.base`."""

import inspect
from typing import Any

from ssmttm.errors import UserError
from ssmttm.mixers.attention import Attention, AttentionState
from ssmttm.mixers.base import Mixer, MixerState
from ssmttm.mixers.mamba1 import Mamba1, Mamba1State
from ssmttm.mixers.mamba2 import Mamba2, Mamba2State
from ssmttm.mixers.mamba3 import Mamba3, Mamba3State
from ssmttm.mixers.s4d import S4D, S4DState

MIXERS: dict[str, type] = {
    "mamba1": Mamba1,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "s4d": S4D,
    "attention": Attention,
}

__all__ = [
    "MIXERS",
    "S4D",
    "Attention",
    "AttentionState",
    "Mamba1",
    "Mamba1State",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "Mixer",
    "MixerState",
    "S4DState",
    "build_mixer",
]


def build_mixer(name: str, d_model: int, **options: Any) -> Mixer:
    """The mixer called `name`, with those of the options that its class takes: one set of sizes fits every mixer.

    Raises:
        UserError: no mixer has that name.
    """
    if name not in MIXERS:
        raise UserError(f"unknown layer {name!r} in model.layers: choose from {', '.join(MIXERS)}")
    taken = inspect.signature(MIXERS[name]).parameters
    return MIXERS[name](d_model, **{key: value for key, value in options.items() if key in taken})
