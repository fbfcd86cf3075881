"""What a model reads of a caption, and of the null condition that guidance holds against it.

plain             the caption's tokens; those of the empty caption. How ssmttm trains.
no_tokens   the caption's tokens; no token at all (MusicGen in transformers: zeros, all of them masked).
unmasked_padding   both padded together to 60 tokens, padding standing as text (the code of arXiv 2601.14786).
Shapes: L text tokens, E text width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder

NullCondition = Callable[[str], tuple[Tensor, Tensor]]


def build_null_condition(kind: str, encoder: TextEncoder) -> NullCondition:
    """A function of one caption: its token states [L, E] and those of its null condition, of another L.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in NULL_CONDITIONS:
        raise UserError(f"unknown reading of captions {kind!r}: choose from {', '.join(NULL_CONDITIONS)}")
    return NULL_CONDITIONS[kind](encoder)


def apply_null_condition(kind: str, text: TextCondition, captions: Sequence[str]) -> TextCondition:
    """Captions of a batch as a model in training reads them: one that was withheld as the empty caption or, with
    "no_tokens", as no token at all."""
    if kind != "no_tokens":
        return text
    told = torch.tensor([bool(caption) for caption in captions], device=text.mask.device)
    return text._replace(mask=text.mask & told[:, None])


def _empty_caption(encoder: TextEncoder) -> NullCondition:
    empty = _tokens(encoder.encode([""]))
    return lambda caption: (_tokens(encoder.encode([caption])), empty)


def _no_tokens(encoder: TextEncoder) -> NullCondition:
    def read(caption: str) -> tuple[Tensor, Tensor]:
        tokens = _tokens(encoder.encode([caption]))
        return tokens, tokens[:0]

    return read


def _unmasked_padding(encoder: TextEncoder) -> NullCondition:
    def read(caption: str) -> tuple[Tensor, Tensor]:
        both = encoder.encode_unmasked([caption, ""], n_tokens=60, token_id=1)
        return both.embeddings[0], both.embeddings[1]

    return read


def _tokens(condition: TextCondition) -> Tensor:
    """The real tokens of the one caption, [L, E]."""
    return condition.embeddings[0, condition.mask[0]]


NULL_CONDITIONS: dict[str, Callable[[TextEncoder], NullCondition]] = {
    "empty_caption": _empty_caption,
    "no_tokens": _no_tokens,
    "unmasked_padding": _unmasked_padding,
}
