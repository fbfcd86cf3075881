"""Metrics of codec tokens: entropy, codebook usage, repeats. Shapes: K codebooks, T frames."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenMetrics:
    """Metrics by codebook [K]."""

    entropy: list[float]  # of single codes, bits
    conditional: list[float]  # entropy of a code given the previous one, bits
    usage: list[float]  # fraction of the codebook's entries that occur
    longest_repeat: int  # frames of the longest run, over all codebooks, that occurs twice


def measure_tokens(codes: np.ndarray, codebook_size: int) -> TokenMetrics:
    """Metrics of the codes [K, T] of one clip."""
    single = [_entropy(row) for row in codes]
    pairs = [_entropy(row[:-1].astype(np.int64) * codebook_size + row[1:]) for row in codes]
    return TokenMetrics(
        entropy=single,
        conditional=[pair - _entropy(row[:-1]) for pair, row in zip(pairs, codes, strict=True)],
        usage=[len(np.unique(row)) / codebook_size for row in codes],
        longest_repeat=longest_repeat(codes),
    )


def longest_repeat(codes: np.ndarray) -> int:
    """Frames of the longest run of columns of [K, T] that occurs twice."""
    _, symbols = np.unique(codes, axis=1, return_inverse=True)
    symbols = symbols.reshape(-1)
    low, high = 0, len(symbols) - 1
    while low < high:  # a repeat of n frames contains one of n - 1
        middle = (low + high + 1) // 2
        runs = np.lib.stride_tricks.sliding_window_view(symbols, middle)
        if len(np.unique(runs, axis=0)) < len(runs):
            low = middle
        else:
            high = middle - 1
    return low


def _entropy(values: np.ndarray) -> float:
    """Empirical entropy in bits."""
    counts = np.unique(values, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0
