"""Train, valid and test splits by a hash, so that a key always falls into the same split."""

import hashlib
from collections.abc import Mapping

SPLITS = ("train", "valid", "test")
PERCENT = {"train": 90, "valid": 5, "test": 5}


def split_by_hash(key: str, percent: Mapping[str, int] = PERCENT, hash_bytes: int = 8) -> str:
    """The split of a key, from the first bytes of its sha256.

    Args:
        percent: per cent of all keys by split; they add up to 100.
        hash_bytes: leading bytes of the hash that count; another number gives another, independent split.
    """
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:hash_bytes], "big") % 100
    limit = 0
    for split, size in percent.items():
        limit += size
        if draw < limit:
            return split
    raise ValueError(f"the percentages {dict(percent)} add up to less than 100")
