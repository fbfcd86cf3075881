"""Pictures with nothing but torch and zlib: a spectrogram as a PNG, round numbers for an axis."""

import math
import struct
import zlib

import torch
from torch import Tensor

from ssmttm.audio import features, resample

_COLOURS = ((12, 12, 32), (49, 27, 94), (116, 38, 112), (183, 55, 92), (236, 104, 65), (252, 174, 72), (252, 245, 190))


def spectrogram_png(wav: Tensor, sample_rate: int, width: int = 640, height: int = 160) -> bytes:
    """A log-mel spectrogram as a PNG, low notes at the bottom, 55 dB from dark to bright. wav [S] or [1, S]."""
    wav = resample(torch.nan_to_num(wav.float()).reshape(1, -1), sample_rate, features.SAMPLE_RATE)
    decibel = features.log_mel(features.level(wav))[0] * 20  # [M, T]
    shade = ((decibel - decibel.max()) / 55 + 1).clamp(0, 1)
    shade = torch.nn.functional.interpolate(shade[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    place = shade.flip(0) * (len(_COLOURS) - 1)
    colours = torch.tensor(_COLOURS, dtype=torch.float32)
    below = place.long().clamp_max(len(_COLOURS) - 2)
    share = (place - below)[..., None]
    pixels = (colours[below] * (1 - share) + colours[below + 1] * share).round().byte()  # [height, width, 3]
    return encode_png(pixels)


def encode_png(pixels: Tensor) -> bytes:
    """An 8-bit RGB PNG. pixels uint8 [height, width, 3]. Source: W3C, Portable Network Graphics, third edition."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in pixels.contiguous())

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose low to high, some `about` of them."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
