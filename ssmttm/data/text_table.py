"""Embeddings of captions on disk, found by the caption's hash.

hashes      uint8 [n, 16], sorted: the first 16 bytes of the sha256 of each caption
offsets     int64 [n+1]: token positions
embeddings  float16 [tokens, E]
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ssmttm.data.tensorfile import map_tensors, read_header, write_tensors
from ssmttm.errors import UserError

_WINDOW = 512  # captions sorted by length together, so that a batch has little padding


def caption_hash(caption: str) -> bytes:
    """The key of a caption's embedding."""
    return hashlib.sha256(caption.encode()).digest()[:16]


class TextTable:
    """Memory-mapped embeddings; a caption is found by binary search over the hashes. Errors as `map_tensors`."""

    def __init__(self, path: Path) -> None:
        tensors = map_tensors(path)
        self._path = path
        self._hashes, self._offsets, self._embeddings = tensors["hashes"], tensors["offsets"], tensors["embeddings"]
        self._prefix = np.ascontiguousarray(self._hashes[:, :8]).view(">u8")[:, 0].astype(np.uint64)

    def find(self, caption: str) -> int | None:
        """The caption's place, or None."""
        key = caption_hash(caption)
        index = int(np.searchsorted(self._prefix, int.from_bytes(key[:8], "big")))
        while index < len(self._prefix) and self._hashes[index, :8].tobytes() == key[:8]:
            if self._hashes[index].tobytes() == key:
                return index
            index += 1
        return None

    def __contains__(self, caption: str) -> bool:
        return self.find(caption) is not None

    def __getitem__(self, caption: str) -> np.ndarray:
        """float16 [L, E]. Raises KeyError if the caption is not here."""
        index = self.find(caption)
        if index is None:
            raise KeyError(f"no embedding of the caption {caption!r} in {self._path}")
        return self._embeddings[self._offsets[index] : self._offsets[index + 1]]


def write_text_table(
    path: Path,
    captions: Iterable[str],
    encode: Callable[[list[str]], list[np.ndarray]],
    dim: int,
    fingerprint: str,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Embed captions, and the empty one, into a table; what the same encoder made before is kept.

    Args:
        path: the table.
        captions: texts, in any order, repeated at will.
        encode: a list of captions -> one float [L_i, dim] a caption.
        fingerprint: of the encoder.
        progress: told how many captions are done, bit by bit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _earlier(path, fingerprint)
    ordered = sorted({"", *captions}, key=caption_hash)
    lengths: list[int] = []
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for first in range(0, len(ordered), _WINDOW):
            window = ordered[first : first + _WINDOW]
            fresh = sorted((text for text in window if known is None or text not in known), key=len)
            made = dict(zip(fresh, encode(fresh), strict=True)) if fresh else {}
            for text in window:
                rows = made[text] if text in made or known is None else known[text]
                spool.write(np.ascontiguousarray(rows, np.float16).tobytes())
                lengths.append(len(rows))
            progress(len(window))
        spool.flush()
        tensors = {
            "hashes": np.frombuffer(b"".join(map(caption_hash, ordered)), np.uint8).reshape(-1, 16),
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "embeddings": np.memmap(spool, np.float16, "r", shape=(sum(lengths), dim)),
        }
        write_tensors(path, tensors, {"fingerprint": fingerprint})


def _earlier(path: Path, fingerprint: str) -> TextTable | None:
    try:
        return TextTable(path) if read_header(path)[1].get("fingerprint") == fingerprint else None
    except UserError:  # none there, or a damaged one: all captions are embedded again
        return None
