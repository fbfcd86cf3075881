"""Soft alignment of the tokens of two tokenizers by character offsets.

Shapes: S student tokens, L teacher tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmttm.errors import UserError


class TokenizedCaption(NamedTuple):
    """A tokenised caption, with special tokens such as [CLS] or </s>."""

    ids: list[int]
    tokens: list[str]
    special: list[bool]
    offsets: list[tuple[int, int]] | None  # start and end in characters; None if the tokenizer has no offsets


def tokenize(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> list[TokenizedCaption]:
    """Captions tokenised by a tokenizer of transformers, truncated to `max_tokens`."""
    options = {"truncation": True, "max_length": max_tokens, "return_special_tokens_mask": True}
    encoded = tokenizer(list(captions), return_offsets_mapping=tokenizer.is_fast, **options)
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(captions)
    return [
        TokenizedCaption(ids, tokenizer.convert_ids_to_tokens(ids), [bool(flag) for flag in special], of_caption)
        for ids, special, of_caption in zip(encoded["input_ids"], encoded["special_tokens_mask"], offsets, strict=True)
    ]


def alignment_matrix(student: TokenizedCaption, teacher: TokenizedCaption) -> Tensor:
    """Weights of the teacher's tokens for each of the student's, [S, L]; every row sums to 1.

    Equal token sequences align one to one. Otherwise a token averages the teacher's tokens that overlap it, or takes
    the nearest one; special tokens before and after the words average those on the same side.
    """
    if student.tokens == teacher.tokens:
        return torch.eye(len(student.ids))
    if student.offsets is None or teacher.offsets is None:
        raise UserError(
            "the tokens of student and teacher differ, and one of the tokenizers has no character offsets: choose "
            "encoders with a tokenizer.json, or start from the teacher's own encoder"
        )
    weights = torch.zeros(len(student.ids), len(teacher.ids))  # [S, L]
    words = [column for column, special in enumerate(teacher.special) if not special]
    for row, ((start, end), special) in enumerate(zip(student.offsets, student.special, strict=True)):
        if special:
            weights[row, _special_tokens(teacher, trailing=_is_trailing(student, row))] = 1
            continue
        gaps = {column: max(teacher.offsets[column][0] - end, start - teacher.offsets[column][1]) for column in words}
        overlapping = [column for column, gap in gaps.items() if gap < 0]
        weights[row, overlapping or [min(gaps, key=gaps.__getitem__)] if gaps else slice(None)] = 1
    return weights / weights.sum(1, keepdim=True)


def _special_tokens(caption: TokenizedCaption, trailing: bool) -> list[int]:
    """The special tokens after the words, or before them; without any there, all special tokens; else all tokens."""
    special = [index for index, flag in enumerate(caption.special) if flag]
    on_side = [index for index in special if _is_trailing(caption, index) == trailing]
    return on_side or special or list(range(len(caption.ids)))


def _is_trailing(caption: TokenizedCaption, index: int) -> bool:
    """Whether a special token follows the words; without words, whether it is the last token."""
    if all(caption.special):
        return index == len(caption.special) - 1
    return not all(caption.special[:index])
