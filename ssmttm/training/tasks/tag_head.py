"""Naming what is heard: a small head that says a segment's tags from inside the language model.

A caption is worth little to one token: to a model trained for an hour, 0.03 nats in the first second and 0.006 in the
next, and nothing at all of that was the mode. Behind one of its blocks the model is therefore asked for
the segment's tags (style, instrument, key, notes of the scale) at every position: at the first from the text alone,
later from the music too. So words and sounds meet in the same directions of the stream. Sampling does not use the head.
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
    """The tags of a store's training split that at least `min_share` of its segments have, and who has them.

    Raises:
        UserError: there are none.
    """

    def __init__(self, store: Store, min_share: float) -> None:
        given = [set(store.tags(row)) for row in range(len(store))]
        train = store.indices("train").tolist()
        counts = Counter(tag for row in train for tag in given[row])
        self.tags = sorted(tag for tag, count in counts.items() if count >= min_share * len(train))
        if not self.tags:
            raise UserError(f"{store.path} has no tags to learn to name: set losses.tags=0")
        place = {tag: index for index, tag in enumerate(self.tags)}
        ids = store.ids(np.arange(len(store)))
        self._of = {name: [place[tag] for tag in tags if tag in place] for name, tags in zip(ids, given, strict=True)}
        self.shares = torch.tensor([counts[tag] / len(train) for tag in self.tags])

    def targets(self, ids: Sequence[str]) -> Tensor:
        """Which tags the segments have: float32 [b, n] of 0 and 1."""
        targets = torch.zeros(len(ids), len(self.tags))
        for row, name in enumerate(ids):
            targets[row, self._of[name]] = 1
        return targets


class TagHead(nn.Module):
    """RMSNorm and Linear, [b, S, D] -> log-odds [b, S, n]; at the start those of the tags' shares."""

    def __init__(self, d_model: int, shares: Tensor) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.linear = nn.Linear(d_model, len(shares))
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data.copy_(torch.logit(shares, eps=1e-3))

    def forward(self, stream: Tensor) -> Tensor:
        return self.linear(self.norm(stream.float()))


def tag_losses(log_odds: Tensor, targets: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, summed over tags and items: at the first position, from text alone; the mean over all.

    Args:
        log_odds: [b, S, n].
        targets: [b, n].
        real: bool [b, S], positions that count.
    """
    asked = targets[:, None].expand_as(log_odds)
    losses = F.binary_cross_entropy_with_logits(log_odds, asked, reduction="none").sum(-1)  # [b, S]
    return losses[:, 0].sum(), (losses.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)).sum()
