"""How large a model is, what it costs, and which depth or width meets a budget of parameters."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ssmttm.errors import UserError
from ssmttm.models import build_model

VARIED = ("n_layers", "d_model")
_WIDEST = 16_384
_ASIDE = ("embedding", "text", "tempo")  # parts of a model that are not multiplied with at every position


class Size(NamedTuple):
    """Parameters and arithmetic of a TokenLM or a LatentDenoiser.

    parameters: all of them. active: N of the 6 N D rule, those that a position multiplies with: all but the codes'
    embedding, which is looked up, and the text's and the tempo's side, which is not run at every position of the audio.
    forward: FLOPs of one position, by counting what each layer does, over a sequence of `frames` behind `text_tokens`
    of text.
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
            f"a position of {self.frames:,} frames behind {self.text_tokens} text tokens:\n"
            f"{self.forward / 1e6:,.1f} MFLOP forward, {3 * self.forward / 1e6:,.1f} in training, {ratio:.2f} times 6 N"
        )


class Fit(NamedTuple):
    """The setting nearest to a budget, the model's exact number of parameters there, and its distance as a share."""

    key: str
    value: int
    parameters: int
    off: float

    def __str__(self) -> str:
        return f"model.{self.key}={self.value}: {self.parameters:,} parameters, {self.off:+.2%} of the budget"


def count_parameters(model: Mapping[str, Any]) -> int:
    """Parameters of the model that a config's `model` section describes; no memory is taken for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


def size_of(model: Mapping[str, Any], frames: int, text_tokens: int = 32) -> Size:
    """Size and cost of the model that a config's `model` section describes."""
    with torch.device("meta"):
        built = build_model(model)
    count = sum(parameter.numel() for parameter in built.parameters())
    parts = [part for name, part in built.named_children() if name in _ASIDE]
    aside = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return Size(count, count - aside, built.flops(frames, text_tokens) / frames, frames, text_tokens)


def fit_budget(model: Mapping[str, Any], parameters: int, vary: str = "n_layers") -> Fit:
    """The depth or width whose model comes nearest to `parameters`, all else as it is.

    Args:
        model: a config's `model` section.
        parameters: the budget.
        vary: "n_layers", in whole periods of a layer pattern, or "d_model", in steps that every head divides.

    Raises:
        UserError: another `vary`, or a budget below the smallest such model.
    """
    if vary not in VARIED:
        raise UserError(f"unknown --vary {vary!r}: choose from {', '.join(VARIED)}")
    step = _step(model, vary)

    def size(multiple: int) -> int:
        return count_parameters({**model, vary: multiple * step})

    if parameters < size(1):
        raise UserError(
            f"{parameters:,} parameters are fewer than the {size(1):,} of model.{vary}={step}: ask for more, or vary "
            f"{next(other for other in VARIED if other != vary)}"
        )
    high = 1
    while size(high) < parameters and high * step < _WIDEST:
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    best = min((low, high), key=lambda multiple: abs(size(multiple) - parameters))
    found = size(best)
    return Fit(vary, best * step, found, found / parameters - 1)


def parse_count(text: str) -> int:
    """A number of parameters as people write it: 300M, 1.5B, 72_000_000."""
    scales = {"K": 1e3, "M": 1e6, "B": 1e9}
    scale = scales.get(text[-1:].upper(), 1)
    try:
        count = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        count = math.nan
    if not 1 <= count < 1e15:
        raise UserError(f"{text!r} is no number of parameters: write 300M, 1.5B or 72000000")
    return round(count)


def _step(model: Mapping[str, Any], vary: str) -> int:
    if vary == "n_layers":
        layers = model["layers"]
        return 1 if isinstance(layers, str) else len(layers)
    expand = model["expand"]
    of_headdim = model["headdim"] * model["ngroups"] // math.gcd(model["headdim"] * model["ngroups"], expand)
    return math.lcm(of_headdim, 2 * model["n_heads"])  # rotary positions turn pairs within a head
