"""The program started by `data_prep.audio.decode`, the only one that parses audio files.

It is run by its path, imports only `ssmttm.audio.containers` of this project, may write no file, has a memory limit,
and dies with its parent. Standard input is a socket. A request is one byte: O (open the file whose descriptor is sent
along), R (read a block) or C (close). The reply to O and R is a message: a byte (its kind), its length and its content.
Kinds: S, the header in JSON; B, a block of samples, interleaved float32, empty at the end of the file; X, a rejection
in JSON; F, a rejection by FFmpeg, which runs as a process of its own, with the same limits, for formats unknown to
libsndfile.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from typing import IO, Any

import soundfile

from ssmttm.audio.containers.mpeg import Pipe, after_id3, states_its_length

HEADER = struct.Struct("<cI")
CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "SVX", "VOC"}
# The containers and decoders that FFmpeg may use: audio only, none that refers to other files or the network.
DEMUXERS = (
    "mov,matroska,asf,ogg,mp3,aac,loas,flac,wav,w64,aiff,caf,au,amr,ac3,eac3,dts,dtshd,truehd,mlp,wv,ape,tta,tak,mpc,mpc8,"
    "dsf,iff,shn,osq,qoa,voc"
)
DECODERS = (
    "aac,aac_latm,alac,als,mp1,mp1float,mp2,mp2float,mp3,mp3float,opus,libopus,vorbis,libvorbis,flac,wavpack,ape,tta,tak,"
    "wmav1,wmav2,wmapro,wmalossless,ac3,eac3,dca,truehd,mlp,amrnb,amrwb,mpc7,mpc8,dsd_lsbf,dsd_msbf,dsd_lsbf_planar,"
    "dsd_msbf_planar,shorten,osq,qoa,gsm,gsm_ms,speex,libspeex,pcm_u8,pcm_s8,pcm_s8_planar,pcm_s16le,pcm_s16be,pcm_s24le,"
    "pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,pcm_alaw,pcm_mulaw,adpcm_ms,adpcm_ima_wav,"
    "adpcm_ima_qt,adpcm_swf,8svx_exp,8svx_fib"
)
# Containers whose header states the duration, so that a truncated file is detected.
_TIMED = {"mov", "matroska", "asf", "wv", "ape", "tta", "tak"}
_UNKNOWN = {1, 4}  # libsndfile: format not recognised, encoding not supported
_UNKNOWN_WORDS = ("unimplemented", "regular file")  # the second is its message for text detected as MP3
_NO_MEMORY = "it needs more memory to decode than allowed"


class Rejection(Exception):
    """A kind of `data_prep.track.KINDS` and a reason."""


class FFmpegRejection(Rejection):
    """A rejection by FFmpeg, which leaves this process unaffected."""


class _SequentialFile(soundfile.SoundFile):
    """Reads without seeking; `soundfile` seeks after each read, which fails for a FLAC without a length."""

    def seekable(self) -> bool:
        return False


class SndFile:
    """A file read by libsndfile."""

    def __init__(self, handle: int) -> None:
        self._pipe: Pipe | None = None
        try:
            self._file = self._open(handle)
        except Rejection as rejection:
            if os.pread(handle, 4, 0) == b"OggS":  # it does not read every FLAC in Ogg
                raise LookupError from rejection
            raise
        if self._file.format == "MP3" and not states_its_length(handle):
            self._file.close()
            self._pipe = Pipe(handle, after_id3(handle))
            try:
                self._file = self._open(self._pipe.end)
            except (LookupError, Rejection):
                self._pipe.close()
                raise
        frames = self._file.frames if self._file.frames >= 0 else 1 << 60
        self._left = frames  # bytes after them, such as a tag, are no audio
        self.header = {
            "format": f"{self._file.format} {self._file.subtype}",
            "channels": self._file.channels,
            "sample_rate": self._file.samplerate,
            "frames": frames if frames < 1 << 60 else None,
            "exact": not self._file.subtype.startswith("MPEG"),
            "big_endian": False,
        }

    def _open(self, handle: int) -> _SequentialFile:
        try:
            file = _SequentialFile(handle, closefd=False)
        except soundfile.LibsndfileError as error:
            if error.code in _UNKNOWN or any(word in error.error_string for word in _UNKNOWN_WORDS):
                raise LookupError from error
            raise _damaged(error) from error
        if file.format not in CONTAINERS:
            raise LookupError
        return file

    def read(self, buffer: memoryview) -> int:
        """Fill `buffer` with samples; returns the bytes that were filled."""
        width = 4 * self._file.channels
        try:
            frames = self._file.buffer_read_into(buffer[: self._left * width], "float32")
        except soundfile.SoundFileError as error:
            raise _damaged(error) from error
        self._left -= frames
        return frames * width

    def close(self) -> None:
        self._file.close()
        if self._pipe is not None:
            self._pipe.close()


class FFmpeg:
    """A file read by FFmpeg; its samples arrive as an AU file through a pipe, with their rate and channels.

    FFmpeg's log goes into a non-blocking pipe that is read at the end, so that a flood of messages neither blocks nor
    uses memory.
    """

    def __init__(self, handle: int, seconds: tuple[float, float]) -> None:
        program = _ffmpeg()
        if program is None:
            reason = "libsndfile does not read its format, and FFmpeg is not installed: install it"
            raise FFmpegRejection("unreadable", reason)
        self._log, log = os.pipe()
        os.set_blocking(log, False)
        os.set_blocking(self._log, False)
        self._process = subprocess.Popen(
            _command(program, handle, seconds[0]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, pass_fds=(handle,), bufsize=0,
            preexec_fn=functools.partial(_restrict, os.getpid(), seconds[1]),
        )  # fmt: skip
        os.close(log)
        assert self._process.stdout is not None
        self._out: IO[bytes] = self._process.stdout
        try:
            self.header = self._begin()
        except Rejection:
            self.close()
            raise

    def read(self, buffer: memoryview) -> int:
        """Fill `buffer` with samples; returns the bytes that were filled."""
        size = self._fill(buffer)
        if size < len(buffer):
            self._finish()
        return size

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        os.close(self._log)

    def _begin(self) -> dict[str, Any]:
        header = bytearray(24)
        if self._fill(memoryview(header)) < 24:
            self._finish()
            raise FFmpegRejection("unreadable", "it is not audio that libsndfile or FFmpeg can read")
        _, offset, _, _, rate, channels = struct.unpack(">4s5I", header)
        self._fill(memoryview(bytearray(offset - 24)))
        known = {"channels": channels, "sample_rate": rate, "exact": False, "big_endian": True}
        return known | _described(self._log_text(), rate)

    def _fill(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and (size := self._out.readinto(buffer[filled:])):  # type: ignore[attr-defined]
            filled += size
        return filled

    def _finish(self) -> None:
        code = self._process.wait()
        if code == 0:
            return
        if "Cannot allocate memory" in self._log_text():
            raise FFmpegRejection("limit", _NO_MEMORY)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            raise FFmpegRejection("limit", "the system killed FFmpeg, probably for lack of memory or time")
        if code < 0:
            raise FFmpegRejection("unreadable", f"the decoder crashed (signal {-code})")
        raise FFmpegRejection("unreadable", "it is not audio that libsndfile or FFmpeg can read, or it is damaged")

    def _log_text(self) -> str:
        with contextlib.suppress(BlockingIOError):
            return os.read(self._log, 1 << 16).decode("utf-8", "replace")
        return ""


def _command(program: str, handle: int, seconds: float) -> list[str]:
    whitelists = ["-protocol_whitelist", "file", "-format_whitelist", DEMUXERS, "-codec_whitelist", DECODERS]
    output = ["-map", "0:a:0", "-vn", "-sn", "-dn", "-map_metadata", "-1", "-bitexact", "-t", f"{seconds:.3f}"]
    return [
        program, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "info", "-max_error_rate", "0.01",
        "-threads", "1", *whitelists, "-i", f"file:/dev/fd/{handle}", *output, "-c:a", "pcm_f32be", "-f", "au", "pipe:1"
    ]  # fmt: skip


def _described(log: str, rate: int) -> dict[str, Any]:
    """Format and length of the first input in FFmpeg's log."""
    container = re.search(r"^Input #0, ([\w,]+), from", log, re.MULTILINE)
    codec = re.search(r"^ +Stream #0:[^:]*: Audio: (\w+)", log, re.MULTILINE)
    length = re.search(r"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", log, re.MULTILINE)
    video = re.search(r"^ +Stream #0:[^:]*: Video: (?!.*\(attached pic\))", log, re.MULTILINE)
    name = container[1].split(",")[0] if container else "unknown"
    frames = None
    if length and name in _TIMED and not video:
        frames = round((int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3])) * rate)
    return {"format": f"{name} {codec[1] if codec else 'unknown'}", "frames": frames}


@functools.cache
def _ffmpeg() -> str | None:
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _damaged(error: soundfile.SoundFileError) -> Rejection:
    message = getattr(error, "error_string", str(error)).rstrip(". ").lower()
    if "malloc" in message or "memory" in message:
        return Rejection("limit", _NO_MEMORY)
    return Rejection("unreadable", f"it is not audio that can be read, or it is damaged ({message})")


def _restrict(parent: int, cpu_seconds: float) -> None:
    """Limits of a decoding process: it dies with its parent, writes no file, leaves no core dump."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    if cpu_seconds:
        _limit(resource.RLIMIT_CPU, math.ceil(cpu_seconds))


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


class Server:
    """Handles requests until the socket is closed."""

    def __init__(self, link: socket.socket, block_bytes: int, seconds: tuple[float, float]) -> None:
        self._link, self._block, self._seconds = link, bytearray(block_bytes), seconds
        self._source: SndFile | FFmpeg | None = None
        self._handle: int | None = None

    def run(self) -> None:
        self._link.sendall(b"!")
        while True:
            request, handles, _, _ = socket.recv_fds(self._link, 1, 1)
            if not request:
                return
            try:
                self._handle_request(request, handles)
            except Rejection as rejection:
                kind = b"F" if isinstance(rejection, FFmpegRejection) else b"X"
                self._send(kind, json.dumps(rejection.args).encode())
            except MemoryError:
                self._send(b"X", json.dumps(("limit", _NO_MEMORY)).encode())

    def _handle_request(self, request: bytes, handles: list[int]) -> None:
        if request == b"O":
            self._handle = handles[0]
            self._source = self._open(self._handle)
            self._send(b"S", json.dumps(self._source.header).encode())
        elif request == b"R":
            assert self._source is not None
            whole = len(self._block) // (4 * self._source.header["channels"]) * 4 * self._source.header["channels"]
            size = self._source.read(memoryview(self._block)[:whole])
            self._send(b"B", memoryview(self._block)[:size])
        else:
            self._close()

    def _open(self, handle: int) -> SndFile | FFmpeg:
        try:
            return SndFile(handle)
        except LookupError:
            return FFmpeg(handle, self._seconds)

    def _close(self) -> None:
        if self._source is not None:
            self._source.close()
        if self._handle is not None:
            os.close(self._handle)
        self._source = self._handle = None

    def _send(self, kind: bytes, content: bytes | memoryview) -> None:
        self._link.sendall(HEADER.pack(kind, len(content)))
        self._link.sendall(content)


def main() -> None:
    """Arguments: the parent's process id, bytes of memory, bytes of a block, seconds of audio, seconds of decoding."""
    parent, memory, block = (int(word) for word in sys.argv[1:4])
    seconds = float(sys.argv[4]), float(sys.argv[5])
    _restrict(parent, 0)
    _limit(resource.RLIMIT_AS, memory)
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write to stderr; a traceback is still shown
    Server(socket.socket(fileno=0), block, seconds).run()


if __name__ == "__main__":
    main()
