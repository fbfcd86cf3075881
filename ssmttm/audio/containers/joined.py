"""Containers other than WAV and similar ones that hold several files in a row: decoders stop at the end of the first.

This module imports no torch.
"""

import io
import re
import struct

from ssmttm.audio.containers.flac import states_too_few_samples

_PIECE = 1 << 20  # bytes
_FIRST_PAGES = 1000  # logical streams of an Ogg file
_BOXES = 100_000
_OGG_BEGINNING = re.compile(rb"OggS\x00[\x02\x03\x06\x07]", re.DOTALL)  # its flags: beginning of a logical stream
_FLAC_BEGINNING = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)
_WAVPACK_BEGINNING = re.compile(rb"wvpk.{4}[\x02-\x10]\x04", re.DOTALL)
_OTHERS = {  # the name of other formats and how their files begin
    "Matroska or WebM": rb"\x1a\x45\xdf\xa3[\x80-\xff\x40\x20\x10\x01].{0,20}\x42\x86\x81\x01",
    "APE": rb"MAC .[\x0e-\x10].{2}\x34\x00\x00\x00\x18\x00\x00\x00",
    "TTA": rb"TTA1[\x01\x02]\x00[\x01-\x08]\x00[\x08-\x20]\x00",
    "TAK": rb"tBaK\x01[\x00-\x20]\x00\x00",
    "Musepack": rb"MPCKSH|MP\+[\x07\x17]",
    "ASF or WMA": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    "DSF": rb"DSD \x1c\x00\x00\x00\x00\x00\x00\x00",
    "VOC": rb"Creative Voice File\x1a",
    "8SVX": rb"FORM.{4}8SVX",
    "AMR": rb"#!AMR(-WB)?\n",
}
_OTHER_BEGINNINGS = {name: re.compile(pattern, re.DOTALL) for name, pattern in _OTHERS.items()}
_LONGEST = 64  # bytes of a pattern's match
_WAVPACK_INITIAL = 1 << 11  # flag: first block of a group of channels


def several_files(file: io.BufferedReader, size: int) -> str:
    """Why a decoder would leave out sound of the file, as "holds ..."; empty if it would not, and for unknown formats.

    Args:
        file: at any place.
        size: bytes of the file.
    """
    file.seek(0)
    head = file.read(_LONGEST)
    if head[:4] == b"OggS":
        return _named("Ogg streams in a row (a chained Ogg)", _search(file, _OGG_BEGINNING, _after_first_pages(file)))
    if head[:4] == b"fLaC" or head[:3] == b"ID3":
        return _flac(file, size)
    if head[4:8] == b"ftyp":
        return _named("MP4 files in a row", _has_box(file, size, b"moov", 2))
    if head[:4] == b"wvpk":
        return _wavpack(file, size)
    for name, beginning in _OTHER_BEGINNINGS.items():
        if beginning.match(head):
            return _named(f"{name} files in a row", _search(file, beginning, 4))
    return ""


def _named(what: str, found: bool) -> str:
    return f"holds several {what}" if found else ""


def _flac(file: io.BufferedReader, size: int) -> str:
    first = 0
    file.seek(0)
    while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
        first += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(first)
    if tag[:4] != b"fLaC":
        return ""
    if _search(file, _FLAC_BEGINNING, first + 4):
        return "holds several FLAC files in a row"
    return states_too_few_samples(file, first, size)


def _wavpack(file: io.BufferedReader, size: int) -> str:
    """Blocks with headers of 32 bytes: length, number of the first sample, number of samples, flags."""
    place, begun = 0, False
    while place + 32 <= size:
        file.seek(place)
        header = file.read(32)
        if header[:4] != b"wvpk":  # tags, after which another file may follow
            return _named("WavPack files in a row", _search(file, _WAVPACK_BEGINNING, place))
        length, high, first, n_samples, flags = struct.unpack("<I2xBx4xIII", header[4:28])
        if n_samples and flags & _WAVPACK_INITIAL:
            if begun and not first and not high:
                return _named("WavPack files in a row", True)
            begun = True
        place += length + 8
    return ""


def _after_first_pages(file: io.BufferedReader) -> int:
    """The end of the pages of an Ogg file that begin its logical streams, all at the start of a file."""
    place = 0
    for _ in range(_FIRST_PAGES):
        file.seek(place)
        page = file.read(27 + 255)
        if not _OGG_BEGINNING.match(page) or len(page) < 27:
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
    """Whether the pattern, whose matches have at most 64 bytes, is found from `place` on."""
    file.seek(place)
    last = b""
    while piece := file.read(_PIECE):
        if pattern.search(last + piece):
            return True
        last = piece[-_LONGEST:]
    return False
