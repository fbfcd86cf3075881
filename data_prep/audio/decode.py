"""Decode any audio file to blocks of samples in a child process, within limits.

libsndfile comes first (wav, flac, ogg, mp3, aiff ...); formats it does not know go to FFmpeg if it is installed. A file
that crashes, hangs or exhausts the decoder ends only that process. The file is opened once, here, so that the checked
file is the decoded one.

Shapes: C channels, s samples; float32.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import ssmttm
from data_prep.track import Rejected
from ssmttm.audio.containers import mpeg
from ssmttm.audio.containers.lengths import audio_bytes, is_truncated, left_out
from ssmttm.errors import UserError

_BLOCK = 1 << 18  # samples over all channels
_FILES = 500  # files per child process at most
_HEADER = 5  # bytes before a message: kind and length, as packed by the child
_START_SECONDS = 60.0
_STARTS = 3  # tries
_CONVERT = "split it, or convert it to one FLAC"
_ROOT = Path(ssmttm.__file__).parents[1]  # for the child, which is run by its path


@dataclass(frozen=True)
class Limits:
    """Limits of a file and of its decoding.

    Attributes:
        max_bytes: size of the file.
        max_seconds: duration of the audio.
        wall_seconds: time of decoding, without the caller's time between blocks.
        memory_bytes: address space of the decoder; FFmpeg needs at least 512 MiB.
        max_channels, rates: of the audio; rates in Hz, lowest and highest.
    """

    max_bytes: int = 4 << 30
    max_seconds: float = 4 * 3600.0
    wall_seconds: float = 600.0
    memory_bytes: int = 2 << 30
    max_channels: int = 8
    rates: tuple[int, int] = (1_000, 384_000)


@dataclass(frozen=True)
class AudioInfo:
    """The header of a file: `format` in words, Hz, and seconds if stated."""

    format: str
    channels: int
    sample_rate: int
    seconds: float | None


class _Crashed(Rejected):
    """The child process has died."""


class _RejectedByFFmpeg(Rejected):
    """The file was rejected by FFmpeg, a process of its own; the child process is unaffected."""


class Decoder:
    """Decodes files one after the other; a context manager, for one thread.

    The child process starts with the first file, is restarted after a file that libsndfile rejected (so that no state
    of a bad file is left), and ends with this object or this process, however that ends.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._busy = False
        self._files = 0
        self._left = 0.0  # seconds of decoding
        self._buffer = bytearray(4 * _BLOCK)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id of the child, if it is running."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child process and its own children."""
        self._end()

    def blocks(self, path: Path) -> Iterator[tuple[np.ndarray, int]]:
        """The whole file, block by block, with its sample rate; every block owns its memory.

        Yields:
            float32 [C, s], contiguous, at most 2**18 samples over all channels, and Hz.

        Raises:
            Rejected: missing, unreadable or limit; possibly after some blocks.
        """
        with self._opened(path, whole=True) as header:
            channels, rate = header["channels"], header["sample_rate"]
            kind = np.dtype(">f4" if header["big_endian"] else "<f4")
            n_frames = 0
            while size := self._block():
                block = np.frombuffer(self._buffer, kind, size // 4).reshape(-1, channels)
                if not np.isfinite(block).all():
                    raise Rejected("unreadable", "it holds NaN or infinite samples")
                n_frames += len(block)
                self._check_seconds(n_frames / rate)
                yield np.array(block.T, np.float32, order="C"), rate
            if n_frames == 0:
                raise Rejected("unreadable", "it holds no samples")
            if header["frames"] is not None and is_truncated(n_frames, header["frames"], header["exact"]):
                raise Rejected("unreadable", f"it is cut short ({n_frames} of {header['frames']} samples)")
            if header["mpeg"] is not None and header["mpeg"].is_left_out(n_frames):
                reason = f"only {n_frames} of the {header['mpeg'].samples} samples that it holds can be decoded"
                raise Rejected("unreadable", reason)

    def probe(self, path: Path) -> AudioInfo:
        """The file's header; no audio is decoded. Raises Rejected as `blocks`."""
        with self._opened(path) as header:
            seconds = None if header["frames"] is None else header["frames"] / header["sample_rate"]
            return AudioInfo(header["format"], header["channels"], header["sample_rate"], seconds)

    @contextmanager
    def _opened(self, path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
        """The file open in the child; yields its header, checked for sound that decoders leave out if `whole`."""
        if self._busy:
            raise RuntimeError("a Decoder reads one file at a time")
        handle, before = _open(path, self._limits.max_bytes)
        self._busy = True
        try:
            frames = _check_whole(handle) if whole else None
            header = self._read_header(handle)
            self._check(header)
            header["mpeg"] = frames if header["format"].lower().startswith("mp3") else None
            if header["mpeg"] is not None and header["mpeg"].fault:
                raise Rejected("unreadable", f"it {header['mpeg'].fault}: {_CONVERT}")
            yield header
            if _state(handle) != before:
                raise Rejected("unreadable", "it changed while it was read")
            self._request(b"C")
        except (GeneratorExit, _RejectedByFFmpeg):
            with suppress(Rejected):
                self._request(b"C")
            raise
        except BaseException:
            self._end()
            raise
        finally:
            os.close(handle)
            self._busy = False

    def _read_header(self, handle: int) -> dict[str, Any]:
        """The header, read by the child. A child that dies here after other files is restarted once."""
        self._left = self._limits.wall_seconds
        self._start()
        try:
            return self._request_header(handle)
        except _Crashed:
            if self._files == 1:
                raise
        self._end()
        self._start()
        return self._request_header(handle)

    def _request_header(self, handle: int) -> dict[str, Any]:
        self._files += 1
        os.lseek(handle, 0, os.SEEK_SET)
        self._request(b"O", [handle])
        header: dict[str, Any] = json.loads(self._buffer[: self._message(b"S")])
        return header

    def _check(self, header: dict[str, Any]) -> None:
        channels, rate = header["channels"], header["sample_rate"]
        if not 1 <= channels <= self._limits.max_channels:
            raise Rejected("limit", f"it has {channels} channels, at most {self._limits.max_channels} are allowed")
        lowest, highest = self._limits.rates
        if not lowest <= rate <= highest:
            raise Rejected("limit", f"its sample rate is {rate} Hz, not within {lowest} to {highest} Hz")
        if header["frames"] is not None:
            self._check_seconds(header["frames"] / rate)

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self._limits.max_seconds:
            raise Rejected("limit", f"it lasts longer than {self._limits.max_seconds:g} s")

    def _block(self) -> int:
        """Read the next block into the buffer; returns its size in bytes, 0 at the end."""
        self._request(b"R")
        return self._message(b"B")

    def _request(self, kind: bytes, handles: list[int] | None = None) -> None:
        assert self._link is not None
        try:
            socket.send_fds(self._link, [kind], handles or [])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def _message(self, wanted: bytes) -> int:
        """Receive a message into the buffer; returns its size in bytes. Raises Rejected if it is a rejection."""
        begun = time.monotonic()
        deadline = begun + self._left
        header = memoryview(bytearray(_HEADER))
        self._receive(header, deadline)
        kind, size = bytes(header[:1]), int.from_bytes(header[1:], "little")
        if kind not in (wanted, b"X", b"F") or size > len(self._buffer):
            raise Rejected("unreadable", "the decoder gave an invalid answer")
        self._receive(memoryview(self._buffer)[:size], deadline)
        self._left -= time.monotonic() - begun
        if kind != wanted:
            raise (_RejectedByFFmpeg if kind == b"F" else Rejected)(*json.loads(self._buffer[:size]))
        return size

    def _receive(self, into: memoryview, deadline: float) -> None:
        assert self._link is not None
        try:
            while len(into):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._link.settimeout(left)
                size = self._link.recv_into(into)
                if size == 0:
                    raise self._died()
                into = into[size:]
        except TimeoutError as error:
            raise Rejected("limit", f"decoding it took longer than {self._limits.wall_seconds:g} s") from error
        except ConnectionResetError as error:
            raise self._died() from error

    def _died(self) -> _Crashed:
        assert self._child is not None
        code = self._child.wait()
        if code == -signal.SIGKILL:
            return _Crashed("limit", "the system killed the decoder, probably for lack of memory")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return _Crashed("unreadable", f"the decoder crashed ({how})")

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None and self._files < _FILES:
            return
        for _ in range(_STARTS):
            if self._start_child():
                return
        raise UserError("the audio decoder does not start: see above, and check that `soundfile` is installed")

    def _start_child(self) -> bool:
        """Start a new child; returns whether it is ready. It may be killed at start, as when memory is short."""
        self._end()
        self._link, link = socket.socketpair()
        limits = self._limits
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(_ROOT))))
        program = Path(__file__).with_name("decoder_process.py")
        numbers = (os.getpid(), limits.memory_bytes, 4 * _BLOCK, limits.max_seconds + 1, limits.wall_seconds)
        with link:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(program), *map(str, numbers)],
                stdin=link.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
            )
        self._files = 0
        self._link.settimeout(_START_SECONDS)
        ready = b""
        with suppress(TimeoutError, ConnectionResetError):
            ready = self._link.recv(1)
        if not ready:
            self._end()
        return bool(ready)

    def _end(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._child is not None:
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._child = self._link = None


def probe(path: Path, limits: Limits = Limits()) -> AudioInfo:
    """A file's header. Raises Rejected if it is missing, unreadable or beyond a limit."""
    with Decoder(limits) as decoder:
        return decoder.probe(path)


def _open(path: Path, max_bytes: int) -> tuple[int, tuple[int, ...]]:
    """A descriptor of a regular file of allowed size that is as long as its header states; and its state."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Rejected("missing", "there is no such file") from error
    except OSError as error:
        raise Rejected("unreadable", f"it cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise Rejected("unreadable", "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("unreadable", "it is not a regular file")
        if status.st_size == 0:
            raise Rejected("unreadable", "it is empty (0 bytes)")
        if status.st_size > max_bytes:
            raise Rejected("limit", f"it is larger than {max_bytes} bytes")
        with open(handle, "rb", closefd=False) as file:
            declared, present = audio_bytes(file, status.st_size)
        if declared > present:
            reason = f"it is cut short: its header states {declared} bytes of audio, it has {present}"
            raise Rejected("unreadable", reason)
    except BaseException:
        os.close(handle)
        raise
    return handle, _state(handle)


def _check_whole(handle: int) -> mpeg.MpegStream | None:
    """The MPEG frames of an open file, if it has any. Raises Rejected if decoders leave out sound of the file."""
    with open(handle, "rb", closefd=False) as file:
        file.seek(0)
        fault = left_out(file, os.fstat(handle).st_size)
    if fault:
        raise Rejected("unreadable", f"it {fault}: {_CONVERT}")
    return mpeg.scan(handle)


def _state(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns
