"""An auxiliary tag classifier on the hidden states of the language model.

The caption reduces the loss of a token only a little, so it is learnt slowly (docs/training.md). The head therefore
predicts the segment's tags (style, instrument, key, notes of the scale) from the hidden states after one block, at each
position: at the first from the text alone, later from the music too. It is not used for sampling.
Shapes: b items, S positions, D model width, n tags.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.data.loader import Item
from ssmttm.data.store import Store
from ssmttm.errors import UserError


class TagVocabulary:
    """The tags of at least a fraction `min_share` of a store's training segments, and the tags of each segment."""

    def __init__(self, store: Store, min_share: float) -> None:
        names, rows, tags = store.tag_table()
        is_train = np.zeros(len(store), bool)
        is_train[store.indices("train")] = True
        counts = np.bincount(tags[is_train[rows]], minlength=len(names))  # [names]
        frequent = sorted(np.flatnonzero(counts >= max(1, min_share * is_train.sum())), key=lambda tag: names[tag])
        self.tags = [names[tag] for tag in frequent]
        if not self.tags:
            raise UserError(f"{store.path} has no tags that are frequent enough: set losses.tags=0")
        index_of = np.full(len(names), -1)
        index_of[frequent] = range(len(frequent))
        kept = index_of[tags] >= 0
        self._indices = index_of[tags[kept]]  # of the tags of all segments, one segment after the other
        self._ends = np.cumsum(np.bincount(rows[kept], minlength=len(store)))  # [segments]
        self.frequencies = torch.from_numpy(counts[frequent] / is_train.sum()).float()

    def targets(self, items: Sequence[Item], batch: Mapping[str, Any]) -> Tensor:
        """The field `tags` of a batch: 1 for each tag of a segment, else 0: float32 [b, n]."""
        targets = torch.zeros(len(items), len(self.tags))
        for index, item in enumerate(items):
            start = self._ends[item.row - 1] if item.row else 0
            targets[index, self._indices[start : self._ends[item.row]]] = 1
        return targets


class TagHead(nn.Module):
    """RMSNorm and Linear, [b, S, D] -> logits [b, S, n]; initialised to the frequencies of the tags."""

    def __init__(self, d_model: int, frequencies: Tensor) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.linear = nn.Linear(d_model, len(frequencies))
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data.copy_(torch.logit(frequencies, eps=1e-3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(self.norm(hidden_states.float()))


def tag_losses(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, summed over tags and items: at the first position, and the mean over valid positions.

    Args:
        logits: [b, S, n].
        targets: [b, n].
        valid: bool [b, S].
    """
    targets = targets[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)  # [b, S]
    return losses[:, 0].sum(), (losses.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)).sum()
