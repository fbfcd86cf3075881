"""Models: TokenLM, a language model of codec codes, and LatentDenoiser, the second stage."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ssmttm.errors import UserError
from ssmttm.models.latent_denoiser import LatentDenoiser, LatentDenoiserConfig
from ssmttm.models.token_lm import LMState, TokenLM, TokenLMConfig

__all__ = ["LMState", "LatentDenoiser", "LatentDenoiserConfig", "TokenLM", "TokenLMConfig", "build_model"]

KINDS: dict[str, tuple[type, type]] = {
    "token_lm": (TokenLM, TokenLMConfig),
    "latent_denoiser": (LatentDenoiser, LatentDenoiserConfig),
}


def build_model(config: Mapping[str, Any]) -> TokenLM | LatentDenoiser:
    """Build the model of a config's `model` section: `kind`, and the fields of its config class. Raises UserError."""
    options = {key: value if isinstance(value, str | Mapping) or not isinstance(value, Sequence) else list(value)
               for key, value in config.items()}  # fmt: skip
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"unknown model.kind {kind!r}: choose from {', '.join(KINDS)}")
    model_class, config_class = KINDS[kind]
    known = {field.name for field in fields(config_class)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise UserError(f"unknown model.{unknown[0]}: a {kind} has {', '.join(sorted(known))}")
    return model_class(config_class(**options))
