"""Parameter counts, FLOPs, and the depth or width that meets a parameter budget."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ssmttm.errors import UserError
from ssmttm.models import build_model

VARIED = ("n_layers", "d_model")
_MAX_VALUE = 16_384
_NOT_PER_POSITION = ("embedding", "text", "tempo")  # modules that are not matrix products at every position


class Size(NamedTuple):
    """Parameters and arithmetic of a TokenLM or a LatentDenoiser.

    parameters: total count. active: N of the 6 N D rule, all but the codes' embedding (a look-up) and the text and
    tempo modules (not run at every audio position). forward: FLOPs per position, counted layer by layer for a sequence
    of `frames` after `text_tokens` text tokens.
    """

    parameters: int
    active: int
    forward: float
    frames: int
    text_tokens: int

    def __str__(self) -> str:
        ratio = 3 * self.forward / (6 * self.active)
        return (
            f"{self.parameters:,} parameters, N = {self.active:,} without embedding and text projection\n"
            f"per position, for {self.frames:,} frames after {self.text_tokens} text tokens:\n"
            f"{self.forward / 1e6:,.1f} MFLOP forward, {3 * self.forward / 1e6:,.1f} in training, {ratio:.2f} times 6 N"
        )


class Fit(NamedTuple):
    """The value of `model.key` that is nearest to a budget, its exact parameter count and the relative error."""

    key: str
    value: int
    parameters: int
    relative_error: float

    def __str__(self) -> str:
        setting, error = f"model.{self.key}={self.value}", f"{self.relative_error:+.2%}"
        return f"{setting}: {self.parameters:,} parameters, {error} of the budget"


def count_parameters(model: Mapping[str, Any]) -> int:
    """Parameters of the model of a config's `model` section, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


def size_of(model: Mapping[str, Any], frames: int, text_tokens: int = 32) -> Size:
    """Size and cost of the model of a config's `model` section."""
    with torch.device("meta"):
        built = build_model(model)
    count = sum(parameter.numel() for parameter in built.parameters())
    excluded = [module for name, module in built.named_children() if name in _NOT_PER_POSITION]
    inactive = sum(parameter.numel() for module in excluded for parameter in module.parameters())
    return Size(count, count - inactive, built.flops(frames, text_tokens) / frames, frames, text_tokens)


def fit_budget(model: Mapping[str, Any], parameters: int, vary: str = "n_layers") -> Fit:
    """The depth or width whose model is nearest to `parameters`, all else unchanged. Raises UserError.

    `vary`: "n_layers", in whole periods of a layer pattern, or "d_model", in steps that every head divides.
    """
    if vary not in VARIED:
        raise UserError(f"unknown --vary {vary!r}: choose from {', '.join(VARIED)}")
    step = _step(model, vary)

    def size(multiple: int) -> int:
        return count_parameters({**model, vary: multiple * step})

    if parameters < size(1):
        raise UserError(
            f"{parameters:,} parameters are fewer than the {size(1):,} of model.{vary}={step}: raise --parameters, or "
            f"use --vary {next(other for other in VARIED if other != vary)}"
        )
    high = 1
    while size(high) < parameters and high * step < _MAX_VALUE:
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    best = min((low, high), key=lambda multiple: abs(size(multiple) - parameters))
    return Fit(vary, best * step, size(best), size(best) / parameters - 1)


def parse_count(text: str) -> int:
    """Parse a parameter count such as 300M, 1.5B or 72_000_000."""
    scales = {"K": 1e3, "M": 1e6, "B": 1e9}
    scale = scales.get(text[-1:].upper(), 1)
    try:
        count = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        count = math.nan
    if not 1 <= count < 1e15:
        raise UserError(f"invalid parameter count {text!r}: write 300M, 1.5B or 72000000")
    return round(count)


def _step(model: Mapping[str, Any], vary: str) -> int:
    if vary == "n_layers":
        layers = model["layers"]
        return 1 if isinstance(layers, str) else len(layers)
    expand = model["expand"]
    group_width = model["headdim"] * model["ngroups"]
    return math.lcm(group_width // math.gcd(group_width, expand), 2 * model["n_heads"])  # rotary: heads of even width
