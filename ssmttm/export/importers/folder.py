"""The model folder that an importer writes, without a path of this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save_file

from ssmttm.codecs import Codec
from ssmttm.errors import UserError
from ssmttm.models.token_lm import TokenLM
from ssmttm.text.encoders import TextEncoder


def write_model(folder: Path, model: TokenLM, pattern: str, card: dict[str, Any]) -> None:
    """config.yaml, model.safetensors and card.json, as `ssmttm.export.model_folder` writes them."""
    config = {"task": "lm", "pattern": pattern, "model": {"kind": "token_lm", **asdict(model.config)}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def card_of(
    name: str, origin: str, model: TokenLM, codec: tuple[str, Codec], text: tuple[str, TextEncoder], null_condition: str
) -> dict[str, Any]:
    """The card: what is known. The licences of the training data are not, which SPDX calls NOASSERTION.

    Args:
        origin: what was imported.
        codec, text: what the card calls them, and themselves.
        reading: see `ssmttm.text.null_condition`.

    Raises:
        UserError: codec or text encoder are not of the model's sizes.
    """
    wanted = model.config.n_codebooks, model.config.codebook_size, model.config.text_dim
    codebooks = min(wanted[0], codec[1].n_codebooks)
    if (codebooks, codec[1].codebook_size, text[1].dim) != wanted:
        raise UserError(
            f"the model has {wanted[0]} codebooks of {wanted[1]} and text of width {wanted[2]}, but codec "
            f"{codec[1].name} has {codec[1].n_codebooks} of {codec[1].codebook_size}, and text encoder {text[1].name} "
            f"gives width {text[1].dim}: give those that it was trained with"
        )
    return {
        "name": name,
        "task": "lm",
        "imported_from": origin,
        "step": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "licence": "NOASSERTION",
        "data": {
            "licences": {"NOASSERTION": None},
            "codec": {"name": codec[0], "fingerprint": codec[1].fingerprint},
            "text": {"name": text[0], "fingerprint": text[1].fingerprint, "null_condition": null_condition},
        },
    }
