"""Loading and saving of the small networks that ship as a folder: config.json (the card) and float16 safetensors."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.files import atomic_write, write_text

Network = TypeVar("Network", bound=nn.Module)


def load_network(folder: Path, build: Callable[[dict[str, Any]], Network], what: str, fix: str) -> Network:
    """Load a network in evaluation mode.

    Args:
        build: builds the untrained network from its card.
        what: its name in errors. fix: advice in errors.
    """
    try:
        network = build(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise UserError(f"no {what} in {folder}: {fix}") from error
    except (ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: damaged {what} ({error}): restore the folder, or {fix}") from error
    return network.eval()


def save_network(network: nn.Module, card: Mapping[str, Any], folder: Path) -> None:
    """Write a network and its card into a folder, each file atomically."""
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file({name: _half(value) for name, value in network.state_dict().items()}, temporary)
    write_text(folder / "config.json", json.dumps(card, indent=1) + "\n")


def network_fingerprint(network: nn.Module, classes: Sequence[str]) -> str:
    """16 hex digits over the weights as stored (float16) and the names of the classes."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_half(value).numpy().tobytes())
    return digest.hexdigest()[:16]


def _half(value: Tensor) -> Tensor:
    """A weight as stored: float16 if it is a float."""
    return (value.half() if value.is_floating_point() else value).contiguous().cpu()
