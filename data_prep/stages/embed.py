"""The stage `text`: embed the captions of a shard with a text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_task import Counts
from data_prep.stages.segments import Segments
from ssmttm.data.text_table import write_text_table
from ssmttm.text.encoders import TextEncoder

TEXT_FILE = "text.safetensors"


@dataclass(frozen=True)
class TextOptions:
    """A text encoder, loaded once per process."""

    name: str  # for `ssmttm.text.encoders.load_text_encoder`
    device: str  # cpu or cuda

    def metadata(self) -> dict[str, Any]:
        """Name, fingerprint and width, as store.json keeps them."""
        encoder = _load(self.name, "cpu")  # the GPU may be in another machine
        return {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim}

    @property
    def encoder(self) -> TextEncoder:
        """The encoder on its device."""
        return _load(self.name, self.device)


def embed_shard(options: TextOptions, segments: Segments, folder: Path) -> Counts:
    """Write a table of the embeddings of a shard's captions."""
    captions = {caption for row in segments.read() for caption in row["captions"] or []}
    encoder = options.encoder

    def encode(batch: Sequence[str]) -> list[np.ndarray]:
        condition = encoder.encode(list(batch))
        return [states[mask].cpu().numpy() for states, mask in zip(*condition, strict=True)]

    write_text_table(folder / TEXT_FILE, captions, encode, encoder.dim, encoder.fingerprint)
    return {"captions": len(captions)}


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> TextEncoder:
    from ssmttm.text.encoders import load_text_encoder

    return load_text_encoder(name).to(device)
