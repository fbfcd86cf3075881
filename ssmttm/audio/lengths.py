"""Detection of truncated audio files from their headers, which libsndfile leaves to its caller."""

import io
import struct
from collections.abc import Iterator

_SLACK, _SLACK_SAMPLES = 0.02, 4096  # tolerance for an estimated length, as in some MP3 files
_UNTIL_THE_END = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}  # written by programs whose output is a pipe
_CHUNKS = 1000  # read at most


def audio_bytes(file: io.BufferedReader, size: int) -> tuple[int, int]:
    """Bytes of audio that the header of a WAV, RF64, W64, AIFF or AU file declares, and bytes present.

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
    for name, length in _chunks(file, head, size):
        if name == b"ds64":
            large = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        if name in (b"data", b"SSND"):
            declared = large if length == 0xFFFFFFFF and large is not None else length
            return (0, 0) if declared in _UNTIL_THE_END else (declared, size - file.tell())
    return 0, 0


def _chunks(file: io.BufferedReader, head: bytes, size: int) -> Iterator[tuple[bytes, int]]:
    """Name and length of each chunk of the RIFF family; the file is positioned at its content."""
    wide = head[:4] == b"riff"
    small = {b"RIFF": "<I", b"RF64": "<I", b"BW64": "<I", b"RIFX": ">I", b"FORM": ">I"}.get(head[:4])
    if not wide and (small is None or head[8:] not in (b"WAVE", b"AIFF", b"AIFC")):
        return
    file.seek(40 if wide else 12)
    for _ in range(_CHUNKS):
        chunk = file.read(24 if wide else 8)
        if len(chunk) < (24 if wide else 8):
            return
        length = struct.unpack("<Q", chunk[16:])[0] - 24 if wide else struct.unpack(small or "", chunk[4:])[0]
        place = file.tell()
        yield chunk[:4], length
        following = place + length + (-length) % (8 if wide else 2)
        if not place <= following < size:
            return
        file.seek(following)


def is_truncated(n_read: int, declared: int, exact: bool) -> bool:
    """Whether `n_read` samples are too few for the `declared` ones, which are an estimate unless `exact`."""
    return n_read < (declared if exact else declared * (1 - _SLACK) - _SLACK_SAMPLES)
