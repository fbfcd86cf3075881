"""The audio of a stream, kept on disk for download while the stream's WebSocket is open."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm import audio


@dataclass
class Branch:
    """What led to a moment: the parts of the recording that are heard one after the other, and what was changed where.

    spans: first byte and number of bytes in the recording's file.
    """

    spans: list[tuple[int, int]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def copy(self) -> "Branch":
        """The same, independent of this one."""
        return Branch(list(self.spans), list(self.history))


class Recording:
    """A temporary file of 16-bit samples; appended to in one thread, read in any. It goes when nothing refers to it.

    Attributes:
        branch: what is heard now.
        is_full: whether the limit is reached; later audio is not kept.
    """

    def __init__(self, sample_rate: int, seconds: float, metadata: dict[str, Any]) -> None:
        self.sample_rate = sample_rate
        self.branch = Branch()
        self.is_full = False
        self._seconds = seconds
        self._metadata = metadata
        self._n_channels = 1  # known with the first audio
        self._size = 0  # bytes
        self._file = tempfile.TemporaryFile(prefix="ssmttm-")  # noqa: SIM115  lives as long as this object

    def describe(self, values: dict[str, Any]) -> None:
        """Add to the metadata of the sidecar."""
        self._metadata = {**self._metadata, **values}

    def append(self, samples: np.ndarray) -> None:
        """Add int16 samples [S, C] to the present branch, until there are `seconds` of all branches."""
        self._n_channels = samples.shape[1]
        limit = round(self._seconds * self.sample_rate) * self._n_channels * 2
        pcm = samples.tobytes()
        self.is_full = self.is_full or self._size + len(pcm) > limit
        if self.is_full:
            return
        os.pwrite(self._file.fileno(), pcm, self._size)
        spans = self.branch.spans
        if spans and sum(spans[-1]) == self._size:
            spans[-1] = (spans[-1][0], spans[-1][1] + len(pcm))
        else:
            spans.append((self._size, len(pcm)))
        self._size += len(pcm)

    def read(self) -> Tensor:
        """The present branch, int16 [C, S]."""
        parts = [os.pread(self._file.fileno(), length, start) for start, length in list(self.branch.spans)]
        samples = np.frombuffer(b"".join(parts), "<i2").reshape(-1, self._n_channels)  # [S, C]
        return torch.from_numpy(samples.T.copy())

    def sidecar(self) -> dict[str, Any]:
        """Where the present branch came from, and what was changed when."""
        n_samples = sum(length for _, length in self.branch.spans) // (2 * self._n_channels)
        return {**self._metadata, "duration": n_samples / self.sample_rate, "history": list(self.branch.history)}


def to_int16(wav: Tensor) -> np.ndarray:
    """Float audio [C, S] -> int16 samples [S, C], rounded as `ssmttm.audio.write` rounds them."""
    samples = (wav * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return samples.T.contiguous().numpy().astype("<i2", copy=False)


def encode(wav: Tensor, sample_rate: int, suffix: str) -> bytes:
    """Audio [C, S], int16 or float, as the bytes of a file of a format such as "flac"."""
    with tempfile.TemporaryDirectory(prefix="ssmttm-") as folder:
        return audio.write(Path(folder) / f"music.{suffix}", wav, sample_rate).read_bytes()
