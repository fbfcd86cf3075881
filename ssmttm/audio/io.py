"""Audio files and what is done to sound as such: read, write, resample, loudness.

Files go through libsndfile (wav, flac, ogg, mp3 and what else it reads). Resampling is soxr's HQ everywhere and never
torchaudio's: a store's codes and a metric must not depend on which packages happen to import.

Shapes: C channels, S samples; float32 in [-1, 1].
"""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.audio.lengths import cut_short, sound_bytes
from ssmttm.errors import UserError
from ssmttm.files import atomic_write

WRITERS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", None)}
_BLOCK = 1 << 20  # samples over all channels read at a time: a header's word is never trusted with memory
_MAX_CHANNELS = 64
_RATES = (1_000, 768_000)
_log = logging.getLogger(__name__)


def read(path: str | Path, sample_rate: int | None = None, mono: bool = True) -> tuple[Tensor, int]:
    """Read a whole audio file.

    Args:
        path: any format that libsndfile reads.
        sample_rate: Hz to resample to; None keeps the file's own.
        mono: mix all channels down to their mean.

    Returns:
        Waveform float32 [C, S] and its sample rate in Hz.

    Raises:
        UserError: no such file, a folder, empty, not audio, cut short, without samples, or with NaN or infinite ones.
    """
    blocks = list(_blocks(Path(path), mono))
    wav, rate = torch.from_numpy(np.concatenate([block for block, _ in blocks], axis=1)), blocks[0][1]
    if sample_rate is None or sample_rate == rate:
        return wav, rate
    return resample(wav, rate, sample_rate), sample_rate


def read_segments(path: str | Path, sample_rate: int, seconds: float) -> Iterator[Tensor]:
    """Read a file of any length piece by piece, mono and resampled in one stream, in little memory.

    Yields:
        float32 [1, S] with S = `seconds` at `sample_rate`; the last one is shorter.

    Raises:
        UserError: as `read`, possibly after some segments.
    """
    import soxr

    length = round(seconds * sample_rate)
    held = np.empty(0, np.float32)
    stream = None
    for block, rate in _blocks(Path(path), mono=True):
        if stream is None and rate != sample_rate:
            stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        held = np.concatenate([held, block[0] if stream is None else stream.resample_chunk(block[0])])
        while len(held) >= length:
            yield torch.from_numpy(held[None, :length].copy())
            held = held[length:]
    if stream is not None:
        held = np.concatenate([held, stream.resample_chunk(np.empty(0, np.float32), last=True)])
    for first in range(0, len(held), length):
        yield torch.from_numpy(held[None, first : first + length].copy())


def read_crop(path: Path, samples: int, choice: int) -> tuple[np.ndarray, int]:
    """Decode one crop of a file, mixed down to mono, and nothing else of it.

    Args:
        samples: S; a shorter file is read whole.
        choice: any integer >= 0; the crop begins at `choice` modulo the number of places where one can.

    Returns:
        float32 [<= S] and the file's sample rate.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    frames = _opened(path, lambda file: file.frames)
    length = min(samples, frames)
    return read_part(path, choice % (frames - length + 1), length)


def read_part(path: Path, start: int, samples: int) -> tuple[np.ndarray, int]:
    """Decode a file's samples from `start` on, mixed down to mono, and nothing else of it.

    Returns:
        float32 [<= samples], shorter where the file ends, and its sample rate.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """

    def part(file: Any) -> tuple[np.ndarray, int]:
        length = max(0, min(samples, file.frames - start))
        file.seek(min(start, file.frames))
        read = file.read(length, dtype="float32", always_2d=True)  # [s, channels]
        if len(read) != length:
            raise UserError(f"{path} is cut short: restore it or prepare it again")
        return read.mean(axis=1), file.samplerate

    return _opened(path, part)


def _opened(path: Path, use: Callable[[Any], Any]) -> Any:
    """What `use` makes of a file of a store, opened by libsndfile."""
    import soundfile as sf

    try:
        with sf.SoundFile(path) as file:
            return use(file)
    except (sf.SoundFileError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it or prepare it again") from error


def read_comment(path: Path) -> str:
    """The comment tag of an audio file; empty if it has none or cannot be read."""
    import soundfile as sf

    try:
        with sf.SoundFile(path) as file:
            return file.comment
    except (sf.SoundFileError, OSError):
        return ""


def write(path: str | Path, wav: Tensor, sample_rate: int, comment: str = "") -> Path:
    """Write an audio file, whole or not at all; the extension names the format: wav, flac (16 bit), ogg or mp3.

    Args:
        wav: [C, S] or [S]; float, of which what goes beyond [-1, 1] is clipped with a warning, or int16, kept as it is.
        comment: a tag inside the file, empty for none.

    Raises:
        UserError: another extension, nothing or NaN in `wav`, a rate the format has not, or the disk is full.
    """
    import soundfile as sf

    path = Path(path)
    container, subtype = _writer_of(path)
    samples = torch.atleast_2d(wav.detach().cpu())  # [C, S]
    if samples.dim() != 2 or samples.numel() == 0:
        raise UserError(f"there is no audio to write to {path} (shape {list(wav.shape)})")
    if samples.dtype != torch.int16:
        samples = _within_full_scale(samples.float(), path)
    encoded = io.BytesIO()
    try:
        with sf.SoundFile(encoded, "w", sample_rate, len(samples), subtype, format=container) as file:
            if comment:
                file.comment = comment
            for block in samples.T.contiguous().split(1 << 16):  # one long Vorbis write overflows a stack
                file.write(block.numpy())
    except sf.SoundFileError as error:
        raise UserError(f"cannot write {path} at {sample_rate} Hz with {len(samples)} channels: {error}") from error
    with atomic_write(path) as aside:
        aside.write_bytes(encoded.getbuffer())
    return path


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample [..., S] float -> float32 [..., ceil(S * to_rate / from_rate)] with soxr's HQ filter."""
    import soxr

    if from_rate == to_rate:
        return wav.float()
    rows = wav.detach().to("cpu", torch.float32).reshape(-1, wav.shape[-1])
    length = -(-wav.shape[-1] * to_rate // from_rate)
    out = np.zeros((len(rows), length), np.float32)
    for index, row in enumerate(rows.numpy()):
        made = soxr.resample(row, from_rate, to_rate)[:length]
        out[index, : len(made)] = made
    return torch.from_numpy(out).reshape(*wav.shape[:-1], length).to(wav.device)


def to_mono(wav: Tensor) -> Tensor:
    """Mean of the channels: [..., C, S] -> [..., 1, S]."""
    return wav.mean(dim=-2, keepdim=True)


def loudness(wav: Tensor, sample_rate: int) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4) of [C, S] or [S], C <= 5; -inf for silence.

    A clip under the standard's 0.4 s block is measured as one block.
    """
    import pyloudnorm

    samples = torch.atleast_2d(wav.detach().to("cpu", torch.float32))
    if len(samples) > 5:
        raise UserError(f"loudness is defined for up to 5 channels, not {len(samples)}: mix down first")
    if samples.shape[1] == 0:
        return float("-inf")
    block = min(0.4, samples.shape[1] / sample_rate)
    with np.errstate(divide="ignore", invalid="ignore"):
        meter = pyloudnorm.Meter(sample_rate, block_size=block)
        measured = meter.integrated_loudness(samples.T.double().numpy())
    return float(measured) if np.isfinite(measured) else float("-inf")


def normalise(wav: Tensor, sample_rate: int, lufs: float = -18.0) -> Tensor:
    """Scale [C, S] or [S] to a loudness in LUFS, or as near as a peak of 1 allows; silence stays as it is."""
    measured = loudness(wav, sample_rate)
    if measured == float("-inf"):
        return wav
    gain = 10 ** ((lufs - measured) / 20)
    return wav * min(gain, 1 / float(wav.abs().max()))


def _blocks(path: Path, mono: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks float32 [C, s] of a file with its sample rate; checks the file first and its length last."""
    import soundfile as sf

    check_file(path)
    try:
        with sf.SoundFile(path) as file:
            if file.channels > _MAX_CHANNELS or not _RATES[0] <= file.samplerate <= _RATES[1]:
                raise UserError(f"{path} has {file.channels} channels at {file.samplerate} Hz: that is no usable audio")
            seen = 0
            while len(block := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise UserError(f"{path} holds NaN or infinite samples: export it again")
                seen += len(block)
                yield (block.mean(axis=1)[None] if mono else np.ascontiguousarray(block.T)), file.samplerate
            if seen == 0:
                raise UserError(f"{path} holds no samples: leave it out or export it again")
            if cut_short(seen, file.frames, exact=file.format != "MP3"):
                raise UserError(f"{path} is cut short ({seen} of {file.frames} samples): copy it again")
    except sf.SoundFileError as error:
        raise UserError(f"{path} is no audio that can be read, or is damaged ({_reason(error)})") from error


def _within_full_scale(samples: Tensor, path: Path) -> Tensor:
    if not bool(torch.isfinite(samples).all()):
        raise UserError(f"the audio for {path} holds NaN or infinite samples: it was not written")
    over = float((samples.abs() > 1).float().mean())
    if over > 0:
        _log.warning("%s: %.2g %% of the samples are beyond full scale and were clipped", path, 100 * over)
    return samples.clamp(-1, 1)


def check_file(path: Path) -> None:
    """Raises UserError unless `path` is a regular file, not empty and as long as its header says."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name an audio file")
    if not path.exists():
        raise UserError(f"there is no file {path}: check the name")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: name an audio file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            declared, present = sound_bytes(file, size)
    except PermissionError as error:
        raise UserError(f"{path} may not be read: change its permissions") from error
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes): leave it out or export it again")
    if declared > present:
        raise UserError(f"{path} is cut short: its header tells of {declared} bytes of sound, {present} are there")


def _writer_of(path: Path) -> tuple[str, str | None]:
    try:
        return WRITERS[path.suffix.lower()]
    except KeyError as error:
        known = ", ".join(suffix[1:] for suffix in WRITERS)
        raise UserError(f"cannot write {path}: the extension must be one of {known}") from error


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the path that is told already."""
    words = str(error).rpartition(": ")[2].rstrip(".").lower()
    return "format not recognised" if "regular file" in words else words  # its guess about text named .mp3
