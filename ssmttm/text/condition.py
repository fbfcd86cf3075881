"""The text condition: token embeddings of a frozen encoder and their mask.

Shapes: B batch, L text tokens, E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TextCondition(NamedTuple):
    """Embedded captions. embeddings: [B, L, E] float. mask: [B, L] bool, True at valid tokens.

    The null condition is the embedding of the empty caption; a row without a valid token has no prefix.
    """

    embeddings: Tensor
    mask: Tensor

    @classmethod
    def stack(cls, rows: Sequence[Tensor]) -> "TextCondition":
        """Left-pad `[L_i, E]` rows to the longest, so that the text ends where the audio begins."""
        longest = max(len(row) for row in rows)
        embeddings = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1], dtype=torch.float32)  # [B, L, E]
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=rows[0].device)  # [B, L]
        for index, row in enumerate(rows):
            start = longest - len(row)
            embeddings[index, start:] = row
            mask[index, start:] = True
        return cls(embeddings, mask)

    def to(self, device: torch.device | str) -> "TextCondition":
        return TextCondition(self.embeddings.to(device), self.mask.to(device))
