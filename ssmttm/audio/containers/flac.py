"""The number of samples of a FLAC file by its last frame, and as its header states it. This module imports no torch."""

import functools
import io
import re
from collections.abc import Iterator

_TAIL = 1 << 18  # bytes in which the last frame begins
_TAGS = (b"TAG", 128)  # an ID3v1 tag after the audio, and its length
_SYNC = re.compile(rb"\xff[\xf8\xf9]", re.DOTALL)
_BLOCK_SIZES = {1: 192, **{code: 144 << code for code in range(2, 6)}, **{code: 1 << code for code in range(8, 16)}}


def states_too_few_samples(file: io.BufferedReader, first: int, size: int) -> str:
    """Why a decoder would leave out sound of a FLAC that begins at byte `first`, as "holds ..."; empty if it would not.

    A header without a number of samples is read to the end of the file.
    """
    file.seek(first + 8)
    info = file.read(34)
    stated = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    if len(info) < 34 or not stated:
        return ""
    largest_block = int.from_bytes(info[2:4], "big")
    start = _after_metadata(file, first + 4)
    file.seek(start)
    beginning = _header(file.read(64), largest_block)
    file.seek(max(start, size - _TAIL))
    tail = file.read()
    if tail[-_TAGS[1] :].startswith(_TAGS[0]):
        tail = tail[: -_TAGS[1]]
    end = next(_ends(tail, largest_block), 0)
    held = end - beginning[0] if beginning else 0  # a part of a stream may keep the numbers of its frames
    return f"holds {held} samples, but states {stated}, where decoders stop" if held > stated else ""


def _after_metadata(file: io.BufferedReader, place: int) -> int:
    """The first byte after the metadata blocks that begin at a place."""
    is_last = False
    while not is_last:
        file.seek(place)
        header = file.read(4)
        is_last = len(header) < 4 or bool(header[0] & 128)
        place += 4 + int.from_bytes(header[1:], "big")
    return place


def _ends(tail: bytes, block: int) -> Iterator[int]:
    """The number of samples at the end of each frame that ends with the file, from its checksums."""
    for found in reversed(list(_SYNC.finditer(tail))):
        frame = tail[found.start() :]
        header = _header(frame, block)
        if header is not None and _crc(frame, 0x8005, 16) == 0:
            yield header[1]


def _header(frame: bytes, block: int) -> tuple[int, int] | None:
    """The numbers of a frame's first sample and of the one after its last (RFC 9639, 9.1); None if the header is none,
    by its checksum.

    `block` is the size of all blocks but the last, for frames that are numbered.
    """
    if len(frame) < 16:
        return None
    n_bytes = max(1, 8 - (~frame[4] & 0xFF).bit_length()) if frame[4] & 0xC0 != 0x80 else 0
    end = 4 + n_bytes
    number = frame[4] & (0x7F if n_bytes == 1 else 0xFF >> n_bytes + 1)
    for byte in frame[5:end]:
        number = number << 6 | byte & 0x3F
    size_code, rate_code = frame[2] >> 4, frame[2] & 15
    size_bytes, rate_bytes = {6: 1, 7: 2}.get(size_code, 0), {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    size = 1 + int.from_bytes(frame[end : end + size_bytes], "big") if size_bytes else _BLOCK_SIZES.get(size_code, 0)
    end += size_bytes + rate_bytes
    if not n_bytes or not size or _crc(frame[: end + 1], 0x07, 8):
        return None
    first = number if frame[1] & 1 else number * block
    return first, first + size


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """A cyclic redundancy check, most significant bit first; 0 over data with its checksum at the end."""
    table, mask = _table(polynomial, bits), (1 << bits) - 1
    value = 0
    for byte in data:
        value = (value << 8 & mask) ^ table[(value >> bits - 8) ^ byte]
    return value


@functools.cache
def _table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
        table.append(value & (1 << bits) - 1)
    return table
