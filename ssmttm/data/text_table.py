"""Caption embeddings on disk, looked up by the hash of the caption.

hashes      uint8 [n, 16], sorted: the first 16 bytes of the sha256 of each caption
offsets     int64 [n+1]: token positions
embeddings  float16 [tokens, E]
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ssmttm.data.tensorfile import concatenate_on_disk, map_tensors, read_header, write_tensors

_WINDOW = 512  # captions that are sorted by length, so that a batch has little padding


def caption_hash(caption: str) -> bytes:
    """The key of a caption's embedding."""
    return hashlib.sha256(caption.encode()).digest()[:16]


class TextTable:
    """Memory-mapped embeddings, with binary search over the caption hashes. Raises as `map_tensors`."""

    def __init__(self, path: Path) -> None:
        tensors = map_tensors(path)
        self._path = path
        self._hashes, self._offsets, self._embeddings = tensors["hashes"], tensors["offsets"], tensors["embeddings"]
        self._prefix = np.ascontiguousarray(self._hashes[:, :8]).view(">u8")[:, 0].astype(np.uint64)

    def find(self, caption: str) -> int | None:
        """The index of a caption, or None."""
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
        """float16 [L, E]. Raises KeyError for an unknown caption."""
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
) -> None:
    """Write the embeddings of captions, and of the empty caption.

    Args:
        captions: in any order, duplicates allowed.
        encode: a list of captions -> one float [L_i, dim] per caption.
        fingerprint: of the encoder.
    """
    ordered = sorted({"", *captions}, key=caption_hash)

    def embeddings() -> Iterator[np.ndarray]:
        for first in range(0, len(ordered), _WINDOW):
            window = ordered[first : first + _WINDOW]
            by_length = sorted(window, key=len)
            embedding_of = dict(zip(by_length, encode(by_length), strict=True))
            yield from (embedding_of[text] for text in window)

    _write_table(path, b"".join(map(caption_hash, ordered)), embeddings(), dim, fingerprint)


def merge_text_tables(path: Path, tables: Sequence[Path]) -> None:
    """Merge tables of one encoder; for a caption in several tables, the first embedding is kept."""
    hashes, lengths = [], []
    for table in tables:
        tensors = map_tensors(table)
        hashes.append(np.array(tensors["hashes"]))
        lengths.append(np.diff(tensors["offsets"]))
    keys, ends = np.concatenate(hashes), np.cumsum(np.concatenate(lengths))  # [n, 16], [n]
    first = np.unique(keys.view("V16")[:, 0], return_index=True)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        rows = concatenate_on_disk((map_tensors(table)["embeddings"] for table in tables), spool)  # [tokens, E]
        spans = zip(ends[first], np.concatenate(lengths)[first], strict=True)
        embeddings = (rows[end - length : end] for end, length in spans)
        fingerprint = read_header(tables[0])[1]["fingerprint"]
        _write_table(path, keys[first].tobytes(), embeddings, rows.shape[1], fingerprint)


def _write_table(path: Path, hashes: bytes, embeddings: Iterable[np.ndarray], dim: int, fingerprint: str) -> None:
    """Stream embeddings to disk, one float [L_i, dim] per hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []

    def counted() -> Iterator[np.ndarray]:
        for rows in embeddings:
            lengths.append(len(rows))
            yield rows.astype(np.float16).reshape(-1, dim)

    with tempfile.TemporaryFile(dir=path.parent) as spool:
        rows = concatenate_on_disk(counted(), spool)
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        keys = np.frombuffer(hashes, np.uint8).reshape(-1, 16)
        write_tensors(path, {"hashes": keys, "offsets": offsets, "embeddings": rows}, {"fingerprint": fingerprint})
