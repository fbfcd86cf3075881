"""Files that are shorter than their header declares, or longer: libsndfile leaves both to its caller.

This module imports no torch.
"""

import io
import re
import struct
from collections.abc import Iterator

_SLACK, _SLACK_SAMPLES = 0.02, 4096  # tolerance for an estimated length, as in some MP3 files
_UNTIL_THE_END = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}  # written by programs whose output is a pipe
_CHUNKS = 1000  # read at most
_PIECE = 1 << 20  # bytes
_SPARE_BYTES = 4096  # after the audio that need no explanation
_BOXES = 100_000
_FILES = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b".snd", b"dns.")
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
_FIRST_PAGE = re.compile(rb"OggS\x00[\x02\x03\x06\x07]", re.DOTALL)  # its flags: beginning of a logical stream
_FIRST_BLOCK = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)


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


def left_out(file: io.BufferedReader, size: int) -> str:
    """Why a decoder would leave out sound of the file, as "holds ..."; empty if it would not.

    Decoders stop at the end of the first of several joined files, and at a length that the header states too short.

    Args:
        file: at its start.
        size: bytes of the file.
    """
    head = file.read(12)
    file.seek(0)
    if head[:4] == b"OggS":
        second = _search(file, _FIRST_PAGE, _after_first_pages(file))
        return "holds several Ogg streams in a row (a chained Ogg)" if second else ""
    if head[:4] == b"fLaC" or head[:3] == b"ID3":
        return _left_out_of_flac(file)
    if head[4:8] == b"ftyp":
        return "holds several MP4 files in a row" if _has_box(file, size, b"moov", 2) else ""
    declared, present = audio_bytes(file, size)
    return _after_audio(file, size, size - present + declared, head) if declared else ""


def _left_out_of_flac(file: io.BufferedReader) -> str:
    first = 0
    while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
        first += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(first)
    if tag[:4] != b"fLaC":
        return ""
    return "holds several FLAC files in a row" if _search(file, _FIRST_BLOCK, first + 4) else ""


def _after_audio(file: io.BufferedReader, size: int, place: int, head: bytes) -> str:
    """What follows the audio of a WAV, RF64, W64, AIFF or AU file at `place`: chunks, tags and zeros are no sound."""
    wide, order = head[:4] == b"riff", ">" if head[:4] in (b"FORM", b"RIFX") else "<"
    for _ in range(_CHUNKS):
        padding = -place % (8 if wide else 2)
        file.seek(place)
        start = file.read(32)
        if not _is_name(start[padding : padding + 4]):
            padding = 0  # of programs that forget it
        start, place = start[padding:], place + padding
        if size - place <= _SPARE_BYTES or start.startswith(_TAGS):
            return ""
        if start[:4] in _FILES:
            return "holds several files in a row"
        if start[:4] in (b"data", b"SSND"):
            return "holds several parts of audio"
        length = struct.unpack("<Q", start[16:24])[0] if wide else 8 + struct.unpack(order + "I", start[4:8])[0]
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


def _after_first_pages(file: io.BufferedReader) -> int:
    """The end of the pages of an Ogg file that begin its logical streams, all at the start of a file."""
    place = 0
    for _ in range(_CHUNKS):
        file.seek(place)
        page = file.read(27 + 255)
        if not _FIRST_PAGE.match(page) or len(page) < 27:
            break
        place += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return place


def _has_box(file: io.BufferedReader, size: int, wanted: bytes, times: int) -> bool:
    """Whether an MP4 file has a box of this name at least so many times, outside all others."""
    place = found = 0
    for _ in range(_BOXES):
        file.seek(place)
        box = file.read(16)
        if len(box) < 8:
            return False
        length = int.from_bytes(box[:4], "big")
        length = int.from_bytes(box[8:], "big") if length == 1 else length
        found += box[4:8] == wanted
        if found == times or length < 8 or place + length >= size:
            break
        place += length
    return found >= times


def _search(file: io.BufferedReader, pattern: re.Pattern[bytes], place: int) -> bool:
    """Whether the pattern, of less than 16 bytes, is found from `place` on."""
    file.seek(place)
    last = b""
    while piece := file.read(_PIECE):
        if pattern.search(last + piece):
            return True
        last = piece[-16:]
    return False
