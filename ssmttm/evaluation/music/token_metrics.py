"""What codes tell by themselves: entropy, how much of a codebook is used, repeats. Shapes: K codebooks, T frames."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenMeasures:
    """Figures of codes, by codebook [K].

    Attributes:
        entropy: of single codes, bits. conditional: of a code given the one before it, bits.
        usage: share of the codebook's entries that occur.
        longest_repeat: frames of the longest run, over all codebooks together, that occurs twice (it may overlap).
    """

    entropy: list[float]
    conditional: list[float]
    usage: list[float]
    longest_repeat: int


def measure_tokens(codes: np.ndarray, codebook_size: int) -> TokenMeasures:
    """Measure the codes [K, T] of one piece."""
    single = [_entropy(row) for row in codes]
    pairs = [_entropy(row[:-1].astype(np.int64) * codebook_size + row[1:]) for row in codes]
    return TokenMeasures(
        entropy=single,
        conditional=[two - _entropy(row[:-1]) for two, row in zip(pairs, codes, strict=True)],
        usage=[len(np.unique(row)) / codebook_size for row in codes],
        longest_repeat=longest_repeat(codes),
    )


def longest_repeat(codes: np.ndarray) -> int:
    """Frames of the longest run of columns of [K, T] that occurs at two places."""
    _, symbols = np.unique(codes, axis=1, return_inverse=True)
    symbols = symbols.reshape(-1)
    low, high = 0, len(symbols) - 1
    while low < high:  # a repeat of n frames holds one of n - 1
        middle = (low + high + 1) // 2
        runs = np.lib.stride_tricks.sliding_window_view(symbols, middle)
        if len(np.unique(runs, axis=0)) < len(runs):
            low = middle
        else:
            high = middle - 1
    return low


def _entropy(values: np.ndarray) -> float:
    """Of the values' frequencies, in bits."""
    counts = np.unique(values, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0
