"""Model folders, the form in which trained models are shared: their files, written and read.

config.yaml         the training config; of a codec config.json, with its `model_type`
model.safetensors   weights
card.json           training data and its licences, codec, text encoder, metrics
codec/, text_encoder/, second_stage/    optional parts; the card refers to them as ./codec and ./text_encoder
vae/                of a second stage, the VAE whose latents it generates
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ssmttm import checkpoint
from ssmttm.config import flatten
from ssmttm.errors import UserError
from ssmttm.files import atomic_folder, atomic_write, folder_update, write_text

_READ_FIRST = ("card.json", "config.json", "config.yaml")  # without which a folder is no model
CODEC, TEXT_ENCODER, SECOND_STAGE, VAE = "codec", "text_encoder", "second_stage", "vae"  # subfolders

RENAMED_CARD_KEYS = {"reading": "null_condition", "guidance_within": "distilled_guidance_scale"}
RENAMED_SUBFOLDERS = {"painter": SECOND_STAGE}
RENAMED_TENSORS = {
    r"\bbranches\b": "sublayers", r"\bmodulation\b": "adaln", r"\bnull_sketch\b": "null_coarse",
    r"\bsketch_noise\b": "coarse_noise_aug", r"\binner\.ahead\b": "inner.forward_mixer",
    r"\binner\.back\b": "inner.backward_mixer", r"\binner\.0\b": "inner.fc1", r"\binner\.3\b": "inner.fc2",
}  # fmt: skip


def write_model_folder(
    folder: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any] | DictConfig, card: Any = None
) -> None:
    """Write the weights, the config (a DictConfig as config.yaml, else config.json) and, if given, the card. Raises
    UserError if the disk is full, or the folder cannot be written.

    A new folder appears whole; in an existing one other files stay, see `folder_to_write`.
    """
    with folder_to_write(folder) as target:
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        with atomic_write(target / "model.safetensors") as path:
            save_file(tensors, path)
        if isinstance(config, DictConfig):
            write_text(target / "config.yaml", OmegaConf.to_yaml(config))
        else:
            write_text(target / "config.json", _json(config))
        if card is not None:
            write_card(target, card)


@contextmanager
def folder_to_write(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder. At the end it becomes the folder, or its files replace those of an existing one, which
    after a crash is the old model or the new one, or has no config and cannot be loaded until it is written again."""
    folder = Path(folder)
    if folder.is_dir():
        with folder_update(folder, _READ_FIRST) as temporary:
            yield temporary
    elif folder.exists():
        raise UserError(f"cannot write to {folder}: it is a file; give the name of a folder")
    else:
        with atomic_folder(folder) as temporary:
            yield temporary


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    write_text(folder / "card.json", _json(card))


def to_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point matrices in float16; vectors and integers as they are."""
    return {
        name: value.to(torch.float16) if value.is_floating_point() and value.ndim > 1 else value
        for name, value in weights.items()
    }


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported model, not a checkpoint."""
    return (folder / "card.json").is_file()


def read_card(folder: str | Path) -> dict[str, Any]:
    """card.json of an exported model, or state.json of a checkpoint. Raises UserError if the file is missing or
    damaged, or has a key of an older version."""
    path = Path(folder) / ("card.json" if is_exported(Path(folder)) else "state.json")
    card = checkpoint.read_document(folder, path.stem)
    if not isinstance(card, dict):
        raise UserError(f"{path}, the model's card, is not a JSON object: export the model again")
    for key in flatten(card):
        for old in RENAMED_CARD_KEYS.keys() & set(key.split(".")):
            raise UserError(f"{path} has the old key {key}: rename {old} to {RENAMED_CARD_KEYS[old]}")
    return card


def training_licences(folder: Path) -> dict[str, int | None]:
    """Licence counts of a model's training data; NOASSERTION (SPDX) without a card."""
    return read_card(folder)["data"]["licences"] if is_exported(folder) else {"NOASSERTION": None}


def check_layout(folder: Path) -> None:
    """Raises UserError if a model folder has a subfolder of an older version."""
    for old, new in RENAMED_SUBFOLDERS.items():
        if (folder / old).is_dir():
            raise UserError(f"{folder} has the old subfolder {old}: rename it to {new}")


def check_tensor_names(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises UserError if tensors have the names of an older version."""
    for name in weights:
        new = name
        for old, replacement in RENAMED_TENSORS.items():
            new = re.sub(old, replacement, new)
        if new != name:
            raise UserError(f"{source} has tensors with old names: {name} is now {new}; rename them, or train again")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
