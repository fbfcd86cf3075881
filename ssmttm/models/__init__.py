"""Models: a language model over codebook codes, and what it is built of."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ssmttm.errors import UserError
from ssmttm.models.token_lm import LMState, TokenLM, TokenLMConfig

__all__ = ["LMState", "TokenLM", "TokenLMConfig", "build_model"]


def build_model(config: Mapping[str, Any]) -> TokenLM:
    """Build the model that a config's `model` section describes: `kind`, and the fields of that kind's config class.

    Raises:
        UserError: the kind or a field is unknown, or a value does not fit.
    """
    options = dict(config)
    kind = options.pop("kind", None)
    if kind != "token_lm":
        raise UserError(f"unknown model.kind {kind!r}: choose token_lm")
    known = {field.name for field in fields(TokenLMConfig)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise UserError(f"unknown model.{unknown[0]}: a token_lm has {', '.join(sorted(known))}")
    if not isinstance(options.get("layers", ""), str):
        options["layers"] = list(options["layers"])
    return TokenLM(TokenLMConfig(**options))
