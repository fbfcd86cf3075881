"""Loading the published weights of embedders: files of tensors, and checkpoints of transformers."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ssmttm.errors import UserError, first_line
from ssmttm.evaluation.embedders.base import fingerprint
from ssmttm.files import file_sha256
from ssmttm.hub import split_revision


def load_weights(module: nn.Module, weights: str | None, name: str, ignore: tuple[str, ...]) -> str:
    """Load a file's tensors into a module; returns 16 hex digits of the file's sha256."""
    if weights is None or not Path(weights).is_file():
        raise UserError(f"embedder {name} ships without weights: set eval.weights.{name}=FILE (.safetensors or .pth)")
    path = Path(weights)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("model", tensors)
        module.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(ignore)})
    except (SafetensorError, RuntimeError, AttributeError, ValueError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path} does not contain the weights of {name}: {first_line(error)}") from error
    return file_sha256(path)[:16]


def import_package(embedder: str, package: str, module: str) -> Any:
    """A module of a package that only one embedder needs. Raises UserError if it is not installed or does not load."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except (ImportError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"embedder {embedder} needs the package {package} ({reason}): pip install {package}") from error


def load_pretrained(from_pretrained: Callable[..., Any], source: str) -> Any:
    """A model or processor of transformers, from a folder or a hub name with or without a revision."""
    name, revision = (source, None) if Path(source).is_dir() else split_revision(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return from_pretrained(name, **({"revision": revision} if revision else {}))
        except (OSError, ValueError) as error:
            reason = "no model in the folder" if Path(source).is_dir() else "not a folder, and download failed"
            raise UserError(f"cannot load {source} ({reason}): download it and give its folder") from error


def checkpoint_fingerprint(model: nn.Module, extractor: Any, settings: Mapping[str, Any]) -> str:
    """16 hex digits over the weights, the settings of the feature extractor and those of the embedder."""
    values = {key: value for key, value in extractor.to_dict().items() if isinstance(value, int | float | str)}
    return model_fingerprint(model, {**values, **settings})


def model_fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """16 hex digits over the weights and the settings."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().float().numpy().tobytes())
    return fingerprint(digest.hexdigest(), settings)
