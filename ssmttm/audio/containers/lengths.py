"""Files that are shorter than their header declares, or longer: libsndfile leaves both to its caller.

This module imports no torch.
"""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ssmttm.audio.containers.joined import several_files

_SLACK, _SLACK_SAMPLES = 0.02, 4096  # tolerance for an estimated length, as in some MP3 files
_UNTIL_THE_END = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}  # written by programs whose output is a pipe
_CHUNKS = 1000  # read at most
_PIECE = 1 << 20  # bytes
_SPARE_BYTES = 4096  # after the audio that need no explanation
_FILES = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b".snd", b"dns.", b"caff")
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")


class _Chunks(NamedTuple):
    """How a container writes its chunks."""

    first: int  # byte of the first chunk
    header: int  # bytes before the contents
    length: str  # the struct of the length, which is the last part of the header
    counted: int  # bytes of the header that the length includes
    align: int  # bytes


_LITTLE, _BIG = _Chunks(12, 8, "<I", 0, 2), _Chunks(12, 8, ">I", 0, 2)
_WAVE_64, _CORE = _Chunks(40, 24, "<Q", 24, 8), _Chunks(8, 12, ">Q", 0, 1)


def _chunks_of(head: bytes) -> _Chunks | None:
    """The chunks of a container by its first 12 bytes: WAV, RF64, AIFF, W64 or CAF; None for others."""
    if head[:4] == b"riff":
        return _WAVE_64
    if head[:4] == b"caff":
        return _CORE
    if head[8:] not in (b"WAVE", b"AIFF", b"AIFC"):
        return None
    by_name = {b"RIFF": _LITTLE, b"RF64": _LITTLE, b"BW64": _LITTLE, b"RIFX": _BIG, b"FORM": _BIG}
    return by_name.get(head[:4])


def audio_bytes(file: io.BufferedReader, size: int) -> tuple[int, int]:
    """Bytes of audio that the header of a WAV, RF64, W64, AIFF, CAF or AU file declares, and bytes present.

    (0, 0) for other formats, and for a size that means "until the end".

    Args:
        file: at its start.
        size: bytes of the file.
    """
    head = file.read(12)
    if head[:4] in (b".snd", b"dns.") and len(head) == 12:
        first, declared = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:])
        return (0, 0) if declared in _UNTIL_THE_END else (declared, max(0, size - first))
    large = None
    for name, length in _walk(file, head, size):
        if name == b"ds64":
            large = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        if name in (b"data", b"SSND"):
            declared = large if length == 0xFFFFFFFF and large is not None else length
            return (0, 0) if declared in _UNTIL_THE_END else (declared, size - file.tell())
    return 0, 0


def _walk(file: io.BufferedReader, head: bytes, size: int) -> Iterator[tuple[bytes, int]]:
    """Name and length of each chunk; the file is positioned at its content."""
    chunks = _chunks_of(head)
    if chunks is None:
        return
    file.seek(chunks.first)
    for _ in range(_CHUNKS):
        header = file.read(chunks.header)
        if len(header) < chunks.header:
            return
        length = _length(header, chunks)
        place = file.tell()
        yield header[:4], length
        following = place + length + (-length) % chunks.align
        if not place <= following < size:
            return
        file.seek(following)


def _length(header: bytes, chunks: _Chunks) -> int:
    """The bytes of a chunk's contents; a length that means "until the end" is kept."""
    length = struct.unpack(chunks.length, header[chunks.header - struct.calcsize(chunks.length) : chunks.header])[0]
    return int(length if length in _UNTIL_THE_END else length - chunks.counted)


def is_truncated(n_read: int, declared: int, exact: bool) -> bool:
    """Whether `n_read` samples are too few for the `declared` ones, which are an estimate unless `exact`."""
    return n_read < (declared if exact else declared * (1 - _SLACK) - _SLACK_SAMPLES)


def left_out(file: io.BufferedReader, size: int) -> str:
    """Why a decoder would leave out sound of the file, as "holds ..."; empty if it would not.

    Decoders stop at the end of the first of several joined files, and at a length that the header states too short.

    Args:
        file: at its start.
        size: bytes of the file.
    """
    head = file.read(12)
    file.seek(0)
    declared, present = audio_bytes(file, size)
    return _after_audio(file, size, size - present + declared, head) if declared else several_files(file, size)


def _after_audio(file: io.BufferedReader, size: int, place: int, head: bytes) -> str:
    """What follows the audio of a chunked or AU file at `place`: chunks, tags and zeros are no sound."""
    chunks = _chunks_of(head) or _LITTLE
    for _ in range(_CHUNKS):
        padding = -place % chunks.align
        file.seek(place)
        start = file.read(32)
        if not _is_name(start[padding : padding + 4]):
            padding = 0  # of programs that leave it out
        start, place = start[padding:], place + padding
        if size - place <= _SPARE_BYTES or start.startswith(_TAGS):
            return ""
        if start[:4] in _FILES:
            return "holds several files in a row"
        if start[:4] in (b"data", b"SSND"):
            return "holds several parts of audio"
        length = chunks.header + _length(start, chunks)
        if head[:4] in (b".snd", b"dns.") or not _is_name(start[:4]) or length < 8 or place + length > size:
            break
        place += length
    file.seek(place)
    while piece := file.read(_PIECE):
        if piece.count(0) < len(piece):
            return f"holds {size - place} bytes after its audio, which its header states too short"
    return ""


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)
