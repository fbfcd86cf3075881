"""The config and the card of an imported model."""

from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm.codecs import Codec
from ssmttm.errors import UserError
from ssmttm.models.token_lm import TokenLM
from ssmttm.text.encoders import TextEncoder


def imported_config(model: TokenLM, pattern: str) -> DictConfig:
    return OmegaConf.create({"task": "lm", "pattern": pattern, "model": {"kind": "token_lm", **asdict(model.config)}})


def imported_card(
    name: str, source: str, model: TokenLM, codec: tuple[str, Codec], text: tuple[str, TextEncoder], null_condition: str
) -> dict[str, Any]:
    """The card. The licences of the training data are unknown: NOASSERTION in SPDX. Raises UserError if the codec or
    the text encoder does not have the model's sizes.

    Args:
        source: what was imported.
        codec, text: their names in the card, and themselves.
    """
    (codec_name, its_codec), (text_name, encoder) = codec, text
    expected = model.config.n_codebooks, model.config.codebook_size, model.config.text_dim
    sizes = min(expected[0], its_codec.n_codebooks), its_codec.codebook_size, encoder.dim
    if sizes != expected:
        needed = f"{expected[0]} codebooks of {expected[1]} and text of width {expected[2]}"
        found = f"codec {its_codec.name} has {its_codec.n_codebooks} of {its_codec.codebook_size}"
        raise UserError(f"the model needs {needed}; {found}, text encoder {encoder.name} gives width {encoder.dim}")
    data = {
        "licences": {"NOASSERTION": None},
        "codec": {"name": codec_name, "fingerprint": its_codec.fingerprint},
        "text": {"name": text_name, "fingerprint": encoder.fingerprint, "null_condition": null_condition},
    }
    return {
        "name": name, "task": "lm", "imported_from": source, "step": None, "licence": "NOASSERTION", "data": data,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
