"""Small networks that are shipped as a folder: config.json, their card, and model.safetensors, weights in float16."""

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


def load_network(folder: Path, build: Callable[[dict[str, Any]], Network], what: str, mend: str) -> Network:
    """Read a network from its folder, ready to be used.

    Args:
        build: makes it, untrained, from its card.
        what: its name in errors. mend: what to do if there is none.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    try:
        network = build(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise UserError(f"no {what} in {folder}: {mend}") from error
    except (ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: damaged {what} ({error}): restore the folder, or {mend}") from error
    return network.eval()


def save_network(network: nn.Module, card: Mapping[str, Any], folder: Path) -> None:
    """Write a network and its card into a folder, each file whole or not at all."""
    with atomic_write(folder / "model.safetensors") as aside:
        save_file({name: _stored(value) for name, value in network.state_dict().items()}, aside)
    write_text(folder / "config.json", json.dumps(card, indent=1) + "\n")


def network_fingerprint(network: nn.Module, answers: Sequence[str]) -> str:
    """16 hex digits over the weights as stored (float16) and the answers that they stand for."""
    digest = hashlib.sha256(json.dumps(answers).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_stored(value).numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored(value: Tensor) -> Tensor:
    """A weight as it is written: float16 where it is a float."""
    return (value.half() if value.is_floating_point() else value).contiguous().cpu()
