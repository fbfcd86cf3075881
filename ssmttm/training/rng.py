"""Seeding, saving and isolating the random generators of torch, numpy and python."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int, rank: int) -> None:
    """Seed torch (all devices), numpy and python, differently on each rank."""
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def get_state() -> dict[str, Any]:
    """All generator states as JSON; `device` is that of this process's accelerator, or null."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": _to_hex(torch.get_rng_state()),
        "device": _to_hex(torch.get_device_module().get_rng_state()) if torch.accelerator.is_available() else None,
        "numpy": [np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_state(state: dict[str, Any]) -> None:
    """The inverse of `get_state`."""
    torch.set_rng_state(_from_hex(state["torch"]))
    of_device = state["device"] if "device" in state else state["cuda"]  # the name in older checkpoints
    if of_device is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(_from_hex(of_device))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed every generator inside the `with` block and restore its state after it."""
    before = get_state()
    seed_all(seed, rank=0)
    try:
        yield
    finally:
        set_state(before)


def _to_hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
