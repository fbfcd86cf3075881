"""Codec folders: config.json with a `model_type`, and model.safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssmttm.codecs.base import Codec
from ssmttm.empty_weights import EmptyWeights
from ssmttm.errors import UserError
from ssmttm.model_folder import write_model_folder

C = TypeVar("C", bound=Codec)


def write_codec_folder(
    folder: Path | str, model_type: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], half: bool
) -> None:
    """Write config.json and model.safetensors (float16 if `half`, else float32)."""
    dtype = torch.float16 if half else torch.float32
    converted = {name: tensor.to(dtype) for name, tensor in weights.items()}
    write_model_folder(folder, converted, {"model_type": model_type, **config})


def read_codec_folder(folder: Path | str, build: Callable[[dict[str, Any]], C]) -> C:
    """The codec of a folder, in float32 and eval mode. Raises UserError if a file is missing or damaged, or the weights
    do not fit the config.

    Args:
        build: builds the codec from the folder's config; raises TypeError on wrong fields.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        config.pop("model_type", None)
        with EmptyWeights():
            codec = build(config)
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"codec folder {folder} has no config.json or no model.safetensors") from error
    except (TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"codec folder {folder} cannot be read: {error}") from error
    expected = codec.weights()
    shapes, expected_shapes = ({k: v.shape for k, v in tensors.items()} for tensors in (weights, expected))
    wrong = {name for name, _ in shapes.items() ^ expected_shapes.items()}
    if wrong:
        raise UserError(f"codec folder {folder}: weights do not fit config.json at {', '.join(sorted(wrong)[:3])}")
    codec.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    return codec.eval()
