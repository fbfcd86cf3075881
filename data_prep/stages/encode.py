"""Audio to codes in windows of one fixed shape, so that the codes do not depend on what else is in the batch.

A convolution's rounding changes with the shape it is given, and now and then a code with it. So every call of the codec
has the same shape [batch, 1, samples]: a segment that fits the window is padded with silence, a longer one is cut into
windows that overlap, and each gives the frames that lie inside its margins.

Shapes: K codebooks, T frames, S samples.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Encoder(Protocol):
    """The part of a codec that encoding needs."""

    name: str
    fingerprint: str
    sample_rate: int
    hop_length: int
    frame_rate: float
    n_codebooks: int
    codebook_size: int

    def encode(self, wav: Tensor) -> Tensor:
        """[B, 1, S] -> codes [B, K, ceil(S / hop_length)]."""


@dataclass(frozen=True)
class Windows:
    """The fixed shape: `seconds` a window, of which `margin_seconds` at an inner edge are only context."""

    seconds: float = 20.0
    margin_seconds: float = 1.0
    batch: int = 4

    def facts(self) -> dict[str, Any]:
        """For store.json; what a batch holds is the machine's."""
        return {"seconds": self.seconds, "margin_seconds": self.margin_seconds, "dtype": "float32"}


def codec_facts(codec: Encoder) -> dict[str, Any]:
    """What a store keeps of the codec that made its codes."""
    return {
        "name": codec.name,
        "fingerprint": codec.fingerprint,
        "sample_rate": codec.sample_rate,
        "frame_rate": codec.frame_rate,
        "n_codebooks": codec.n_codebooks,
        "codebook_size": codec.codebook_size,
    }


def plan(n_frames: int, window: int, margin: int) -> list[tuple[int, int, int]]:
    """Windows that cover `n_frames`: (first frame, first kept, end of the kept), the last two within the window."""
    if n_frames <= window:
        return [(0, 0, n_frames)]
    plans, covered = [], 0
    while covered < n_frames:
        first = max(0, covered - margin)
        end = min(first + window - margin, n_frames)
        if first + window >= n_frames:
            end = n_frames
        plans.append((first, covered - first, end - first))
        covered = end
    return plans


@torch.no_grad()
def encode_all(
    wavs: Iterable[Tensor], codec: Encoder, windows: Windows, device: torch.device | str = "cpu"
) -> Iterator[np.ndarray]:
    """Codes of each waveform in turn.

    Args:
        wavs: float32 [1, S] at the codec's rate, S >= 1.

    Yields:
        uint16 [K, ceil(S / hop)].
    """
    window = math.ceil(windows.seconds * codec.frame_rate)
    margin = min(math.ceil(windows.margin_seconds * codec.frame_rate), (window - 1) // 2)
    samples = window * codec.hop_length
    pieces: list[Tensor] = []  # [1, <= samples] each
    kept: list[tuple[int, int, bool]] = []  # first, end, last of its waveform
    parts: list[np.ndarray] = []

    def run() -> Iterator[np.ndarray]:
        batch = torch.zeros(windows.batch, 1, samples)
        for index, piece in enumerate(pieces):
            batch[index, :, : piece.shape[1]] = piece
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            codes = codec.encode(batch.to(device)).to("cpu").numpy().astype(np.uint16)  # [batch, K, window]
        for index, (first, end, last) in enumerate(kept):
            parts.append(codes[index, :, first:end])
            if last:
                yield np.concatenate(parts, axis=1)
                parts.clear()
        pieces.clear()
        kept.clear()

    for wav in wavs:
        plans = plan(-(-wav.shape[1] // codec.hop_length), window, margin)
        for index, (start, first, end) in enumerate(plans):
            pieces.append(wav[:, start * codec.hop_length : start * codec.hop_length + samples])
            kept.append((first, end, index == len(plans) - 1))
            if len(pieces) == windows.batch:
                yield from run()
    if pieces:
        yield from run()
