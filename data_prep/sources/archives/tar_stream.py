"""A streaming reader of untrusted tar archives: POSIX (ustar, pax) and GNU, plain or gzip.

Depending on the version, Python's `tarfile` loops, reads without end or leaves its folder on crafted archives. This
reader yields files only, reports other entries by kind, and bounds what it reads.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.track import Rejected

_BLOCK = 512
_HEADER_BYTES = 1 << 20  # of a pax header or a long name
_CHUNK = 1 << 20
_KINDS = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device",
    b"5": "folder", b"6": "FIFO",
}  # fmt: skip


class BadArchive(Rejected):
    """The rest of an archive cannot be read."""


@dataclass(frozen=True)
class Bounds:
    """Limits of an archive: number of entries, unpacked bytes, unpacked over packed bytes."""

    members: int = 1_000_000
    total_bytes: int = 64 << 30
    ratio: float = 100.0


class Stream:
    """The unpacked bytes of an archive, counted; `file` is a regular file at its start."""

    def __init__(self, file: BinaryIO, bounds: Bounds) -> None:
        self._file, self._bounds = file, bounds
        self._size = os.fstat(file.fileno()).st_size
        self._packed = file.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
        self._source: BinaryIO = gzip.GzipFile(fileobj=file) if self._packed else file  # type: ignore[assignment]
        self._position = 0

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end. Raises BadArchive beyond a bound or if the archive is damaged."""
        try:
            data = self._source.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged() from error
        self._advance(len(data))
        return data

    def skip(self, size: int) -> None:
        """Skip bytes, which must exist."""
        if not self._packed:
            if self._position + size > self._size:
                raise _damaged()
            self._source.seek(size, os.SEEK_CUR)
            self._advance(size)
            return
        while size > 0:
            data = self.read(min(size, _CHUNK))
            if not data:
                raise _damaged()
            size -= len(data)

    def _advance(self, size: int) -> None:
        self._position += size
        if self._position > self._bounds.total_bytes:
            raise BadArchive("limit", f"the archive has more than {self._bounds.total_bytes} bytes")
        if self._packed and self._position > 16 * _CHUNK + self._bounds.ratio * self._file.tell():
            raise BadArchive("limit", f"the archive unpacks to more than {self._bounds.ratio:g} times its size")


class Member:
    """An entry: its unchecked name, its kind (`file`, or a description of what it is), its size in bytes."""

    def __init__(self, stream: Stream, name: str, kind: str, size: int) -> None:
        self.name, self.kind, self.size = name, kind, size
        self._stream, self._left = stream, size

    def chunks(self) -> Iterator[bytes]:
        """The content in chunks. Raises BadArchive if the archive ends before it."""
        while self._left:
            data = self._stream.read(min(self._left, _CHUNK))
            if not data:
                raise _damaged()
            self._left -= len(data)
            yield data

    def finish(self) -> None:
        """Skip to the next header."""
        self._stream.skip(self._left + -self.size % _BLOCK)
        self._left = 0


def members(file: BinaryIO, bounds: Bounds) -> Iterator[Member]:
    """The entries in order; unread content is skipped.

    Raises:
        BadArchive: unreadable (not a tar, damaged, truncated) or limit. The entries before are valid.
    """
    stream = Stream(file, bounds)
    extra: dict[str, str] = {}
    for _ in range(3 * bounds.members):  # an entry may have two extended headers
        header = stream.read(_BLOCK)
        if not header.strip(b"\0"):
            return
        flag, member = _entry(stream, header, extra)
        if flag in (b"x", b"L"):
            content = _content(member)
            extra |= _pax(content) if flag == b"x" else {"path": _text(content)}
        elif flag not in (b"g", b"K"):
            yield member
            extra = {}
        member.finish()
    raise BadArchive("limit", f"the archive has more than {bounds.members} entries")


def _entry(stream: Stream, header: bytes, extra: dict[str, str]) -> tuple[bytes, Member]:
    """Type flag and entry of a header, with the values `extra` of the extended headers before it."""
    blank = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if len(header) < _BLOCK or _number(header[148:156]) != blank:
        raise _damaged()
    flag = header[156:157]
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    size = _number(header[124:136])
    if flag in (b"x", b"g", b"L", b"K"):
        return flag, Member(stream, name, "extended header", size)
    if flag == b"S" or any(key.startswith("GNU.sparse") for key in extra):
        raise BadArchive("unreadable", "the archive has a sparse file")
    name = extra.get("path", name)
    size = _decimal(extra["size"]) if "size" in extra else size
    kind = "folder" if name.endswith("/") else _KINDS.get(flag, "unknown entry")
    return flag, Member(stream, name, kind, size if kind in ("file", "unknown entry") else 0)


def _content(member: Member) -> bytes:
    if member.size > _HEADER_BYTES:
        raise BadArchive("limit", f"the archive has a header of {member.size} bytes")
    return b"".join(member.chunks())


def _pax(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`; LENGTH is that of the whole record."""
    found = {}
    while content:
        length = content[:12].partition(b" ")[0]
        record, content = content[: _decimal(_text(length))], content[_decimal(_text(length)) :]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise _damaged()
        found[_text(key)] = _text(value)
    return found


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or a binary number after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.translate(None, b"01234567"):
        raise _damaged()
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 20):
        raise _damaged()
    return int(text)


def _damaged() -> BadArchive:
    return BadArchive("unreadable", "the archive is not a tar, damaged or truncated")
