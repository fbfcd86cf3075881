"""Audio that goes out while it is made: to a pipe as WAV or raw PCM, or to a sound device.

Shapes: C channels, s samples of a chunk, float32 in [-1, 1].
"""

import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

from torch import Tensor

from ssmttm.errors import UserError

_UNKNOWN = 0xFFFFFFFF  # the size in the header of a WAV whose end is not known, as FFmpeg and SoX write and read it
STREAM_FORMATS = ("wav", "pcm")


def write_stream(file: BinaryIO, chunks: Iterable[Tensor], sample_rate: int, channels: int, format: str) -> int:
    """Write chunks [C, s] as 16-bit little-endian samples, each as soon as it is there.

    Args:
        format: "wav", or "pcm" without a header.

    Returns:
        The number of samples per channel.
    """
    if format == "wav":
        frame = 2 * channels
        fmt = struct.pack("<HHIIHH", 1, channels, sample_rate, sample_rate * frame, frame, 16)
        sizes = struct.pack("<I", _UNKNOWN)
        file.write(b"RIFF" + sizes + b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + sizes)
    n_samples = 0
    for chunk in chunks:
        samples = (chunk.clamp(-1, 1) * 32767).round().short().T.contiguous()  # [s, C]
        file.write(samples.numpy().astype("<i2").tobytes())
        file.flush()
        n_samples += len(samples)
    return n_samples


def play(chunks: Iterable[Tensor], sample_rate: int, channels: int) -> int:
    """Play chunks [C, s] on the default sound device. Returns the number of samples per channel. Raises UserError
    without the package sounddevice or without a device."""
    with _open_device(sample_rate, channels) as device:
        n_samples = 0
        for chunk in chunks:
            device.write(chunk.clamp(-1, 1).T.contiguous().numpy())
            n_samples += chunk.shape[-1]
    return n_samples


def _open_device(sample_rate: int, channels: int) -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio is missing
        raise UserError(
            "--play needs sounddevice and PortAudio (pip install sounddevice): or use --stream -"
        ) from error
    try:
        return sounddevice.OutputStream(samplerate=sample_rate, channels=channels, dtype="float32")
    except sounddevice.PortAudioError as error:
        raise UserError(f"there is no sound device to play on ({error}): write a file, or use --stream -") from error
