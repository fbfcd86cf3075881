"""A text encoder for tests: every word is a random vector seeded by its letters."""

import torch
from small_stores import TEXT_DIM

from ssmttm.text.condition import TextCondition


class WordEncoder:
    """Encodes a caption as a start token and its words. Width and fingerprint default to those of the small stores."""

    max_tokens = 64

    def __init__(self, name="fake", fingerprint="1" * 16, dim=TEXT_DIM):
        self.name, self.fingerprint, self.dim = name, fingerprint, dim

    def encode(self, captions):
        rows = []
        for caption in captions:
            words = ["<s>", *caption.split()][: self.max_tokens]
            seeds = [int.from_bytes(word.encode()[-6:], "big") for word in words]
            rows.append(torch.stack([torch.randn(self.dim, generator=torch.Generator().manual_seed(s)) for s in seeds]))
        return TextCondition.stack(rows)
