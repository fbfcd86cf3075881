"""A pseudo-random permutation of n items in O(1) memory, and the hash that makes every random choice of the loaders.

The permutation is a Feistel network over the smallest even number of bits that holds n, walked along its cycle until
the value falls inside [0, n) (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

import hashlib

import numpy as np

_ROUNDS = 6


def mix(*parts: int | str) -> int:
    """A 64-bit hash of its arguments, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) from `mix`, one of 2^24 equally likely ones: exact in float32."""
    return (mix(*parts) >> 40) / 2**24


class Permutation:
    """A bijection of `range(n)` chosen by `key`.

    Args:
        n: number of items, at least 1.
        key: integers or strings; another key gives another permutation.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = [np.uint64(mix(round_index, *key)) for round_index in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Permute int64 positions in [0, n), any shape -> int64 of the same shape."""
        values = self._encrypt(positions.astype(np.uint64))
        outside = values >= self.n
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.n
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_splitmix64(right ^ key) & self._mask)
        return (left << self._half) | right


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
