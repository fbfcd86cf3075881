"""Reading, writing and resampling audio.

Files go through libsndfile (wav, flac, ogg, mp3 and others); what it does not read goes to torchcodec, if that loads.
Resampling on a CPU always uses soxr's HQ filter: codes and metrics must not depend on which packages are installed.

Shapes: C channels, S samples; float32 in [-1, 1].
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.audio import torchaudio_adapter
from ssmttm.audio.containers import mpeg
from ssmttm.audio.containers.lengths import audio_bytes, is_truncated, left_out
from ssmttm.errors import UserError
from ssmttm.files import atomic_write

WRITERS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", None)}
_BLOCK = 1 << 20  # samples over all channels per read, so that a wrong header cannot exhaust memory
_MAX_CHANNELS = 64
_RATES = (1_000, 768_000)
_UNKNOWN_FORMAT = 1  # libsndfile's code of an error
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
        UserError: the file is missing, empty, truncated or not audio, or holds no samples, NaN or infinity.
    """
    blocks = list(_blocks(Path(path), mono))
    wav, rate = torch.from_numpy(np.concatenate([block for block, _ in blocks], axis=1)), blocks[0][1]
    if sample_rate is None or sample_rate == rate:
        return wav, rate
    return resample(wav, rate, sample_rate), sample_rate


def read_segments(path: str | Path, sample_rate: int, seconds: float) -> Iterator[Tensor]:
    """Read a file of any length in segments, mono and resampled in one stream, with little memory.

    Yields:
        float32 [1, S] with S = `seconds` at `sample_rate`; the last one is shorter.

    Raises:
        UserError: as `read`, possibly after some segments.
    """
    import soxr

    length = round(seconds * sample_rate)
    pending = np.empty(0, np.float32)
    stream = None
    for block, rate in _blocks(Path(path), mono=True):
        if stream is None and rate != sample_rate:
            stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        pending = np.concatenate([pending, block[0] if stream is None else stream.resample_chunk(block[0])])
        while len(pending) >= length:
            yield torch.from_numpy(pending[None, :length].copy())
            pending = pending[length:]
    if stream is not None:
        pending = np.concatenate([pending, stream.resample_chunk(np.empty(0, np.float32), last=True)])
    for first in range(0, len(pending), length):
        yield torch.from_numpy(pending[None, first : first + length].copy())


def read_crop(path: Path, samples: int, choice: int, mono: bool = True) -> tuple[np.ndarray, int]:
    """Decode only one crop of a file of a store, mixed down if `mono`.

    Args:
        samples: S; a shorter file is read completely.
        choice: any integer >= 0; the crop starts at `choice` modulo the number of possible starts.

    Returns:
        float32 [<= S] if `mono`, else [C, <= S], and the file's sample rate.
    """
    if _is_of_unknown_length(path):
        wav, rate = read(path, mono=mono)
        length = min(samples, wav.shape[1])
        start = choice % (wav.shape[1] - length + 1)
        crop = wav[:, start : start + length].numpy()
        return (crop[0] if mono else crop), rate
    with _open(path) as file:
        length = min(samples, file.frames)
        return _read_frames(path, file, choice % (file.frames - length + 1), length, mono)


def read_part(path: Path, start: int, samples: int, mono: bool = True) -> tuple[np.ndarray, int]:
    """Decode a file of a store from `start` on: float32 [<= samples], mixed down, if `mono`, else [C, <= samples]; and
    its sample rate."""
    if _is_of_unknown_length(path):
        wav, rate = read(path, mono=mono)
        part = wav[:, start : start + max(0, samples)].numpy()
        return (part[0] if mono else part), rate
    with _open(path) as file:
        return _read_frames(path, file, min(start, file.frames), max(0, min(samples, file.frames - start)), mono)


def _is_of_unknown_length(path: Path) -> bool:
    """Whether a file is an MP3 that does not state its length, so that only decoding it whole tells the length."""
    with _open(path) as file, open(path, "rb") as opened:
        return file.format == "MP3" and not mpeg.states_its_length(opened.fileno())


def _read_frames(path: Path, file: Any, start: int, length: int, mono: bool) -> tuple[np.ndarray, int]:
    file.seek(start)
    frames = file.read(length, dtype="float32", always_2d=True)  # [s, channels]
    if len(frames) != length:
        raise UserError(f"{path} is truncated: restore it or prepare it again")
    return (frames.mean(axis=1) if mono else frames.T), file.samplerate


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A file of a store, opened by libsndfile. Raises UserError if it cannot be read."""
    import soundfile as sf

    try:
        with sf.SoundFile(path) as file:
            yield file
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
    """Write an audio file atomically; the extension gives the format: wav, flac, ogg or mp3.

    Args:
        wav: [C, S] or [S]; int16, or float, which is clipped to [-1, 1] with a warning and rounded to 16 bit. So every
            format gets the same samples.
        comment: a tag inside the file; empty for none.

    Raises:
        UserError: unknown extension, empty or NaN `wav`, a rate that the format does not support, or a full disk.
    """
    import soundfile as sf

    path = Path(path)
    container, subtype = _writer_of(path)
    samples = torch.atleast_2d(wav.detach().cpu())  # [C, S]
    if samples.dim() != 2 or samples.numel() == 0:
        raise UserError(f"no audio to write to {path} (shape {list(wav.shape)})")
    if samples.dtype != torch.int16:
        samples = _to_16_bit(samples.float(), path)
    encoded = io.BytesIO()
    try:
        with sf.SoundFile(encoded, "w", sample_rate, len(samples), subtype, format=container) as file:
            if comment:
                file.comment = comment
            for block in samples.T.contiguous().split(1 << 16):  # one long Vorbis write overflows a stack
                # libsndfile garbles 16-bit stereo given to its MP3 encoder: lossy encoders get floats
                file.write(block.numpy() if subtype == "PCM_16" else block.numpy().astype(np.float32) / 32768)
    except sf.SoundFileError as error:
        raise UserError(f"cannot write {path} at {sample_rate} Hz with {len(samples)} channels: {error}") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
    return path


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample [..., S] float -> float32 [..., ceil(S * to_rate / from_rate)] with soxr's HQ filter.

    On a GPU torchaudio does it there, if it is installed; else the audio goes to the CPU and back.
    """
    import soxr

    if from_rate == to_rate:
        return wav.float()
    if wav.device.type != "cpu" and (there := torchaudio_adapter.resample(wav.float(), from_rate, to_rate)) is not None:
        return there
    rows = wav.detach().to("cpu", torch.float32).reshape(-1, wav.shape[-1])
    length = -(-wav.shape[-1] * to_rate // from_rate)
    out = np.zeros((len(rows), length), np.float32)
    for index, row in enumerate(rows.numpy()):
        resampled = soxr.resample(row, from_rate, to_rate)[:length]
        out[index, : len(resampled)] = resampled
    return torch.from_numpy(out).reshape(*wav.shape[:-1], length).to(wav.device)


def to_mono(wav: Tensor) -> Tensor:
    """Mean of the channels: [..., C, S] -> [..., 1, S]."""
    return wav.mean(dim=-2, keepdim=True)


def _blocks(path: Path, mono: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks float32 [C, s] of a file and its sample rate; checks the file first and its length last."""
    import soundfile as sf

    check_file(path)
    frames = _check_whole(path)
    if not _is_read_by_libsndfile(path) and (decoded := torchaudio_adapter.decode(path)) is not None:
        wav, rate, seconds = decoded
        if not wav.numel() or not bool(wav.isfinite().all()):
            raise UserError(f"{path} contains no samples, or NaN or infinite ones: export it again")
        if seconds is not None and is_truncated(wav.shape[1], round(seconds * rate), exact=False):
            raise UserError(f"{path} is truncated ({wav.shape[1] / rate:.1f} of {seconds:.1f} s): copy it again")
        yield (wav.mean(0, keepdim=True) if mono else wav).numpy(), rate
        return
    try:
        with _open_whole(path) as file:
            if file.channels > _MAX_CHANNELS or not _RATES[0] <= file.samplerate <= _RATES[1]:
                raise UserError(f"{path} has {file.channels} channels at {file.samplerate} Hz: that is not supported")
            n_read = 0
            while len(block := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise UserError(f"{path} contains NaN or infinite samples: export it again")
                n_read += len(block)
                yield (block.mean(axis=1)[None] if mono else np.ascontiguousarray(block.T)), file.samplerate
            if n_read == 0:
                raise UserError(f"{path} contains no samples: remove it or export it again")
            if file.seekable() and is_truncated(n_read, file.frames, exact=file.format != "MP3"):
                raise UserError(f"{path} is truncated ({n_read} of {file.frames} samples): copy it again")
            if file.format == "MP3" and frames is not None and frames.is_left_out(n_read):
                raise UserError(f"{path} is damaged: only {n_read} of its {frames.samples} samples can be decoded")
    except sf.SoundFileError as error:
        raise UserError(f"{path} cannot be read as audio ({_reason(error)}): convert it to FLAC or WAV") from error


def _check_whole(path: Path) -> mpeg.MpegStream | None:
    """The MPEG frames of a file, if it has any. Raises UserError if decoders leave out sound of the file."""
    with open(path, "rb", buffering=1 << 16) as file:
        fault = left_out(file, path.stat().st_size)
        frames = mpeg.scan(file.fileno())
    if fault := fault or (frames.fault if frames else ""):
        raise UserError(f"{path} {fault}: split it, or convert it to one FLAC")
    return frames


def _is_read_by_libsndfile(path: Path) -> bool:
    """Whether libsndfile knows the format; damaged files of known formats count."""
    import soundfile as sf

    try:
        sf.info(str(path))
    except sf.LibsndfileError as error:
        return error.code != _UNKNOWN_FORMAT
    return True


@contextmanager
def _open_whole(path: Path) -> Iterator[Any]:
    """A file opened by libsndfile, through a pipe if it is an MP3 that does not state its length."""
    import soundfile as sf

    with open(path, "rb") as opened, sf.SoundFile(path) as file:
        if file.format != "MP3" or mpeg.states_its_length(opened.fileno()):
            yield file
            return
        pipe = mpeg.Pipe(opened.fileno(), mpeg.after_id3(opened.fileno()))
        try:
            with sf.SoundFile(pipe.end, closefd=False) as file:
                yield file
        finally:
            pipe.close()


def _to_16_bit(samples: Tensor, path: Path) -> Tensor:
    """Round to the nearest int16. Encoders of libsndfile round float samples each in its own way."""
    if not bool(torch.isfinite(samples).all()):
        raise UserError(f"the audio for {path} contains NaN or infinite samples: it was not written")
    over = float((samples.abs() > 1).float().mean())
    if over > 0:
        _log.warning("%s: %.2g %% of the samples exceed full scale and were clipped", path, 100 * over)
    return (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a regular, non-empty file that is as long as its header declares."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give an audio file")
    if not path.exists():
        raise UserError(f"{path} does not exist: check the name")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: give an audio file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            declared, present = audio_bytes(file, size)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: check its permissions") from error
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes): remove it or export it again")
    if declared > present:
        raise UserError(f"{path} is truncated: its header declares {declared} bytes of audio, it has {present}")


def _writer_of(path: Path) -> tuple[str, str | None]:
    try:
        return WRITERS[path.suffix.lower()]
    except KeyError as error:
        known = ", ".join(suffix[1:] for suffix in WRITERS)
        raise UserError(f"cannot write {path}: the extension must be one of {known}") from error


def _reason(error: Exception) -> str:
    """libsndfile's message without the path."""
    words = str(error).rpartition(": ")[2].rstrip(".").lower()
    return "format not recognised" if "regular file" in words else words  # libsndfile's message about text named .mp3
