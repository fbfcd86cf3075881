"""The stage `text`: the captions of a shard as embeddings of one text encoder."""

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
class Embedder:
    """A text encoder by name, loaded once in each process that embeds.

    Attributes:
        name: as `ssmttm.text.encoders.load_text_encoder` takes it.
        device: cpu or cuda.
    """

    name: str
    device: str

    def facts(self) -> dict[str, Any]:
        """Name, fingerprint and width, as a store keeps them."""
        encoder = _loaded(self.name, "cpu")  # the GPU may be another machine's
        return {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim}

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded."""
        return _loaded(self.name, self.device)


def embed_shard(embedder: Embedder, segments: Segments, folder: Path) -> Counts:
    """Write a table of the embeddings of a shard's captions."""
    captions = {caption for row in segments.read() for caption in row["captions"] or []}
    encoder = embedder.encoder

    def encode(batch: Sequence[str]) -> list[np.ndarray]:
        condition = encoder.encode(list(batch))
        return [states[mask].cpu().numpy() for states, mask in zip(*condition, strict=True)]

    write_text_table(folder / TEXT_FILE, captions, encode, encoder.dim, encoder.fingerprint)
    return {"captions": len(captions)}


@lru_cache(maxsize=1)
def _loaded(name: str, device: str) -> TextEncoder:
    from ssmttm.text.encoders import load_text_encoder

    return load_text_encoder(name).to(device)
