"""How a model encodes a caption, and the null condition of classifier-free guidance.

empty_caption      the caption's tokens; those of the empty caption. The default of ssmttm.
no_tokens          the caption's tokens; no token at all (MusicGen in transformers: zeros, all masked).
unmasked_padding   both padded to 60 tokens, with padding that is not masked (the code of arXiv 2601.14786).
Shapes: L text tokens, E text embedding width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder

NullCondition = Callable[[str], tuple[Tensor, Tensor]]
NULL_CONDITIONS = ("empty_caption", "no_tokens", "unmasked_padding")
_RENAMED = {"plain": "empty_caption", "null_is_nothing": "no_tokens", "visible_padding": "unmasked_padding"}


def build_null_condition(kind: str, encoder: TextEncoder) -> NullCondition:
    """A function of one caption: its token states [L, E] and those of its null condition, of another L.

    Raises:
        UserError: unknown kind.
    """
    if kind in _RENAMED:
        raise UserError(f"null_condition {kind!r} is now called {_RENAMED[kind]!r}: change it in card.json")
    if kind not in NULL_CONDITIONS:
        raise UserError(f"unknown null_condition {kind!r}: choose from {', '.join(NULL_CONDITIONS)}")

    def encode_unmasked(caption: str) -> tuple[Tensor, Tensor]:
        text = encoder.encode_unmasked([caption, ""], n_tokens=60, token_id=1)
        return text.embeddings[0], text.embeddings[1]

    if kind == "unmasked_padding":
        return encode_unmasked
    empty = encoder.encode([""]).embeddings[0]  # [L, E]
    null = empty[:0] if kind == "no_tokens" else empty
    return lambda caption: (encoder.encode([caption]).embeddings[0], null)


def apply_null_condition(kind: str, text: TextCondition, captions: Sequence[str]) -> TextCondition:
    """Text of a training batch in which dropped captions are empty: with "no_tokens", those rows are masked."""
    if kind != "no_tokens":
        return text
    has_caption = torch.tensor([bool(caption) for caption in captions], device=text.mask.device)
    return text._replace(mask=text.mask & has_caption[:, None])
