"""Which tokens of one tokenizer speak of the same characters as those of another.

Shapes: S tokens of a student, L tokens of its teacher.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmttm.errors import UserError


class TokenizedCaption(NamedTuple):
    """A caption as a tokenizer cuts it, marks such as [CLS] or </s> included.

    Attributes:
        ids, names: of each token.
        special: whether it is a mark.
        spans: the characters of the caption, first and behind the last; None where the tokenizer cannot tell.
    """

    ids: list[int]
    names: list[str]
    special: list[bool]
    spans: list[tuple[int, int]] | None


def cut(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> list[TokenizedCaption]:
    """Captions as a tokenizer of transformers cuts them, no longer than `max_tokens`."""
    options = {"truncation": True, "max_length": max_tokens, "return_special_tokens_mask": True}
    made = tokenizer(list(captions), return_offsets_mapping=tokenizer.is_fast, **options)
    spans = made["offset_mapping"] if tokenizer.is_fast else [None] * len(captions)
    return [
        TokenizedCaption(ids, tokenizer.convert_ids_to_tokens(ids), [bool(mark) for mark in special], where)
        for ids, special, where in zip(made["input_ids"], made["special_tokens_mask"], spans, strict=True)
    ]


def align(student: TokenizedCaption, teacher: TokenizedCaption) -> Tensor:
    """What each token of the student is to say, as shares of its teacher's tokens: [S, L], every row adds up to 1.

    Equal tokens answer to each other one by one. Else a token has equal shares of the teacher's that overlap it, or the
    nearest one where none does; marks in front and behind have those in front and behind, or all where there are none.

    Raises:
        UserError: the tokens differ, and a tokenizer does not tell where they are.
    """
    if student.names == teacher.names:
        return torch.eye(len(student.ids))
    if student.spans is None or teacher.spans is None:
        raise UserError(
            "the student's tokens are not its teacher's, and one of the tokenizers does not say which characters a "
            "token stands for: give encoders with a tokenizer.json, or start from the teacher's own encoder"
        )
    shares = torch.zeros(len(student.ids), len(teacher.ids))  # [S, L]
    words = [place for place, special in enumerate(teacher.special) if not special]
    for row, ((first, end), special) in enumerate(zip(student.spans, student.special, strict=True)):
        if special:
            shares[row, _marks(teacher, behind=_is_behind(student, row))] = 1
            continue
        gaps = {place: max(teacher.spans[place][0] - end, first - teacher.spans[place][1]) for place in words}
        over = [place for place, gap in gaps.items() if gap < 0]
        shares[row, over or [min(gaps, key=gaps.__getitem__)] if gaps else slice(None)] = 1
    return shares / shares.sum(1, keepdim=True)


def _marks(pieces: TokenizedCaption, behind: bool) -> list[int]:
    """The marks behind the words, or in front of them; all of them where there are none; all tokens without marks."""
    every = [place for place, special in enumerate(pieces.special) if special]
    there = [place for place in every if _is_behind(pieces, place) == behind]
    return there or every or list(range(len(pieces.ids)))


def _is_behind(pieces: TokenizedCaption, place: int) -> bool:
    """Whether a mark stands behind the words; where there are none, the last one does."""
    if all(pieces.special):
        return place == len(pieces.special) - 1
    return not all(pieces.special[:place])
