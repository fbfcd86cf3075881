"""An auxiliary tag classifier on the hidden states of the language model.

The caption reduces the loss of a token only a little, so it is learnt slowly (docs/training.md). The head therefore
predicts the segment's tags (style, instrument, key, notes of the scale) from the hidden states after one block, at each
position: at the first from the text alone, later from the music too. It is not used for sampling.
Shapes: b items, S positions, D model width, n tags.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.data.store import Store
from ssmttm.errors import UserError


class TagVocabulary:
    """The tags of at least a fraction `min_share` of a store's training segments, and the tags of each segment."""

    def __init__(self, store: Store, min_share: float) -> None:
        tags_by_row = [set(store.tags(row)) for row in range(len(store))]
        train = store.indices("train").tolist()
        counts = Counter(tag for row in train for tag in tags_by_row[row])
        self.tags = sorted(tag for tag, count in counts.items() if count >= min_share * len(train))
        if not self.tags:
            raise UserError(f"{store.path} has no tags that are frequent enough: set losses.tags=0")
        index_of = {tag: index for index, tag in enumerate(self.tags)}
        ids = store.ids(np.arange(len(store)))
        self._indices = {
            segment: [index_of[tag] for tag in tags if tag in index_of]
            for segment, tags in zip(ids, tags_by_row, strict=True)
        }
        self.frequencies = torch.tensor([counts[tag] / len(train) for tag in self.tags])

    def targets(self, ids: Sequence[str]) -> Tensor:
        """1 for each tag of a segment, else 0: float32 [b, n]."""
        targets = torch.zeros(len(ids), len(self.tags))
        for row, segment in enumerate(ids):
            targets[row, self._indices[segment]] = 1
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
