"""The stage `codes`: encode the segments of a shard with a codec (or a VAE), in windows of one fixed shape.

The rounding of a convolution, and so now and then a code, changes with the input's shape. So every call of the codec
has the shape [batch, C, samples]: shorter segments are padded with silence, longer ones are cut into overlapping
windows of which only the frames inside the margins are kept. The codes do not depend on the other items of the batch.

Shapes: C channels of the codec, K codebooks, T frames, S samples.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.shard_task import Counts
from data_prep.stages.segments import Segments
from ssmttm import audio
from ssmttm.codecs.autoencoder import Autoencoder
from ssmttm.codecs.base import Codec
from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.tensorfile import write_tensors

CODES_FILE = "codes.safetensors"


@dataclass(frozen=True)
class Windows:
    """The fixed shape: `batch` windows of `seconds`, with a margin of context at inner edges."""

    seconds: float = 20.0
    margin_seconds: float = 1.0
    batch: int = 4


@dataclass(frozen=True)
class CodecOptions:
    """A codec, loaded once per process."""

    name: str  # for `ssmttm.codecs.load_codec`
    windows: Windows  # shape of its input
    device: str  # cpu or cuda

    def metadata(self) -> dict[str, Any]:
        """What decides the codes, except for a machine's rounding; as store.json keeps it."""
        codec = _load(self.name, "cpu")  # the GPU may be in another machine
        names = ("name", "fingerprint", "sample_rate", "frame_rate", "n_codebooks", "codebook_size")
        windows = {"seconds": self.windows.seconds, "margin_seconds": self.windows.margin_seconds, "dtype": "float32"}
        metadata = {name: getattr(codec, name) for name in names} | {"windows": windows}
        metadata |= {} if codec.channels == 1 else {"channels": codec.channels}
        return metadata | ({"name": self.name} if Path(self.name).is_dir() else {})  # where training finds it again

    def exact_metadata(self) -> dict[str, Any]:
        """Everything that decides the codes."""
        return self.metadata() | {"batch": self.windows.batch, "device": self.device}

    def check_channels(self, channels: int) -> None:
        """Raise UserError unless the codec takes audio of so many channels."""
        codec = _load(self.name, "cpu")
        codec.check_channels(channels, f"--codec {self.name}")

    @property
    def codec(self) -> Codec:
        """The codec on its device."""
        return _load(self.name, self.device)


class Window(NamedTuple):
    """A window of a waveform, in frames: it begins at `start`; its frames `first` to `end` are kept."""

    start: int
    first: int
    end: int


def encode_shard(options: CodecOptions, segments: Segments, folder: Path) -> Counts:
    """Write `codes` uint16 [K, T_total] and `offsets` [n + 1] of the segments, in the order of the rows."""
    rows, codec = segments.read(), options.codec
    wavs = read_audio(segments, rows, codec)
    encoded = [codes.astype(np.uint16) for codes in encode_all(wavs, codec, options.windows, options.device)]
    offsets = np.cumsum([0, *(codes.shape[1] for codes in encoded)], dtype=np.int64)
    codes = np.concatenate([np.empty((codec.n_codebooks, 0), np.uint16), *encoded], axis=1)
    write_tensors(folder / CODES_FILE, {"codes": codes, "offsets": offsets})
    return {"segments": len(rows), "seconds": sum(row["duration"] for row in rows)}


def plan_windows(n_frames: int, window: int, margin: int) -> list[Window]:
    """Windows of `window` frames whose kept frames cover 0 ... n_frames - 1 once."""
    if n_frames <= window:
        return [Window(0, 0, n_frames)]
    windows, covered = [], 0
    while covered < n_frames:
        start = max(0, covered - margin)
        end = n_frames if start + window >= n_frames else start + window - margin
        windows.append(Window(start, covered - start, end - start))
        covered = end
    return windows


@torch.no_grad()
def encode_all(
    wavs: Iterable[Tensor], codec: Autoencoder, windows: Windows, device: torch.device | str = "cpu"
) -> Iterator[np.ndarray]:
    """Encode waveforms in order.

    Args:
        wavs: float32 [C, S] at the codec's rate, S >= 1.

    Yields:
        Codes of each, int64 [K, ceil(S / hop_length)], or a VAE's latents, float32 [c, ceil(S / hop_length)].
    """
    length = math.ceil(windows.seconds * codec.frame_rate)  # frames
    margin = min(math.ceil(windows.margin_seconds * codec.frame_rate), (length - 1) // 2)
    samples = length * codec.hop_length
    batch: list[tuple[Tensor, Window, bool]] = []  # input [C, <= samples], window, last of its waveform
    parts: list[np.ndarray] = []  # codes of the waveform so far

    def encode_batch() -> Iterator[np.ndarray]:
        inputs = torch.zeros(windows.batch, len(batch[0][0]), samples)
        for index, (wav, _, _) in enumerate(batch):
            inputs[index, :, : wav.shape[1]] = wav
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            codes = codec.encode(inputs.to(device)).to("cpu").numpy()  # [batch, K, length]
        for index, (_, window, is_last) in enumerate(batch):
            parts.append(codes[index, :, window.first : window.end])
            if is_last:
                yield np.concatenate(parts, axis=1)
                parts.clear()
        batch.clear()

    for wav in wavs:
        planned = plan_windows(-(-wav.shape[1] // codec.hop_length), length, margin)
        for window in planned:
            begin = window.start * codec.hop_length
            batch.append((wav[:, begin : begin + samples], window, window is planned[-1]))
            if len(batch) == windows.batch:
                yield from encode_batch()
    if batch:
        yield from encode_batch()


class _NoMoreRows(Exception):
    """Ends the prefetch thread."""


def read_audio(segments: Segments, rows: list[dict[str, Any]], codec: Autoencoder) -> Iterator[Tensor]:
    """The waveforms [C, S] at the codec's rate, read by a thread while the codec runs."""

    def read(index: int) -> Tensor:
        if index == len(rows):
            raise _NoMoreRows
        return audio.read(segments.audio / rows[index]["audio"], codec.sample_rate, mono=codec.channels == 1)[0]

    with suppress(_NoMoreRows):
        yield from prefetch_batches(read, 0, 4)


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> Codec:
    from ssmttm.codecs import load_codec

    return load_codec(name).to(device)
