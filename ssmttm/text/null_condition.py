"""What a model reads of a caption, and of the null condition that guidance holds against it.

plain             the caption's tokens; those of the empty caption. How ssmttm trains.
null_is_nothing   the caption's tokens; no token at all (MusicGen in transformers: zeros, all of them masked).
visible_padding   both padded together to 60 tokens, padding standing as text (the code of arXiv 2601.14786).
Shapes: L text tokens, E text width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder

Reader = Callable[[str], tuple[Tensor, Tensor]]


def build_reader(kind: str, encoder: TextEncoder) -> Reader:
    """A function of one caption: its token states [L, E] and those of its null condition, of another L.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in READINGS:
        raise UserError(f"unknown reading of captions {kind!r}: choose from {', '.join(READINGS)}")
    return READINGS[kind](encoder)


def as_read(kind: str, text: TextCondition, captions: Sequence[str]) -> TextCondition:
    """Captions of a batch as a model in training reads them: one that was withheld as the empty caption or, with
    "null_is_nothing", as no token at all."""
    if kind != "null_is_nothing":
        return text
    told = torch.tensor([bool(caption) for caption in captions], device=text.mask.device)
    return text._replace(mask=text.mask & told[:, None])


def _plain(encoder: TextEncoder) -> Reader:
    empty = _tokens(encoder.encode([""]))
    return lambda caption: (_tokens(encoder.encode([caption])), empty)


def _null_is_nothing(encoder: TextEncoder) -> Reader:
    def read(caption: str) -> tuple[Tensor, Tensor]:
        tokens = _tokens(encoder.encode([caption]))
        return tokens, tokens[:0]

    return read


def _visible_padding(encoder: TextEncoder) -> Reader:
    def read(caption: str) -> tuple[Tensor, Tensor]:
        both = encoder.encode_visibly_padded([caption, ""], n_tokens=60, token_id=1)
        return both.embeddings[0], both.embeddings[1]

    return read


def _tokens(condition: TextCondition) -> Tensor:
    """The real tokens of the one caption, [L, E]."""
    return condition.embeddings[0, condition.mask[0]]


READINGS: dict[str, Callable[[TextEncoder], Reader]] = {
    "plain": _plain,
    "null_is_nothing": _null_is_nothing,
    "visible_padding": _visible_padding,
}
