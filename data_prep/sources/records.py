"""Tables of data sets, read record by record in bounded memory.

A record that cannot be read has a `Rejected` with its line as its values, and reading goes on. Only a file that is no
such table is a UserError.
"""

import ast
import csv
import json
import re
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

MAX_LINE = 1 << 20
NOT_UTF8 = "is not UTF-8 text"
_MAX_LIST = 20_000
_BOM = b"\xef\xbb\xbf"
_LONE_CR = re.compile(rb"(?<=\r)(?!\n)")


class Record(NamedTuple):
    """A record of a table."""

    line: int  # number of its first line, from 1
    offset: int  # of its first byte
    values: Any  # by column, or a `Rejected`


def require(path: Path, what: str) -> Path:
    """The path, if it is a file. Raises UserError with a description of the file if not."""
    if not path.is_file():
        raise UserError(f"no file {path} ({what})")
    return path


def good(values: Any) -> Any:
    """The values of a record. Raises Rejected if it cannot be read."""
    if isinstance(values, Rejected):
        raise values
    return values


def rejection_of(path: Path, record: Record) -> Rejection:
    """The rejection of a record that cannot be read."""
    return record.values.for_item(f"{path.name} line {record.line}")


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their line ends. Of a line longer than MAX_LINE only the first MAX_LINE + 1 bytes are returned."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def csv_records(path: Path, start: int = 0) -> Iterator[Record]:
    """Records of a comma-separated file from byte `start`; values are lists of cells, blank lines are skipped."""
    with open_table(path) as file:
        file.seek(start)
        lines = _Lines(file)
        reader = csv.reader(lines)
        while True:
            line, offset = lines.number + 1, lines.offset
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(line, offset, Rejected("metadata", f"line {line} is not valid CSV ({error})"))
                continue
            if problem := lines.problem(cells):
                yield Record(line, offset, Rejected("metadata", f"line {line} {problem}"))
            elif cells:
                yield Record(line, offset, cells)


class CsvTable:
    """A comma-separated table with a header, UTF-8.

    Args:
        needed: required columns.
        rename: the name of a column, from that in the header.
        joined: names of which every column counts; of others the first.

    Raises:
        UserError: no such file, not UTF-8, or a column is missing.
    """

    def __init__(
        self,
        path: Path,
        needed: Iterable[str],
        rename: Callable[[str], str] | None = None,
        joined: Collection[str] = (),
    ) -> None:
        self.path = path
        first = next(csv_records(path), None)
        if first is None or isinstance(first.values, Rejected):
            why = "it is empty" if first is None else first.values.reason
            raise UserError(f"{path} is not a CSV with a header ({why}): save it as comma-separated UTF-8")
        self._header_offset, self._n_cells = first.offset, len(first.values)
        self._columns: dict[str, list[int]] = {}
        for index, written in enumerate(first.values):
            name = (rename or column)(written)
            if name in joined or name not in self._columns:
                self._columns.setdefault(name, []).append(index)
        missing = [name for name in needed if name not in self._columns]
        if missing:
            shown = " ".join(", ".join(first.values)[:200].split())
            hint = "separate columns by commas" if {";", "\t"} & set(shown) else "add it to the header"
            raise UserError(f"{path} has no column {missing[0]!r} in its header ({shown}): {hint}")

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[Record]:
        """Records with values by column; missing cells are empty."""
        for record in csv_records(self.path):
            if record.offset > self._header_offset:
                yield self._named(record)

    def at(self, offset: int) -> dict[str, Any]:
        """The values of the record at a byte `offset`."""
        return good(self._named(next(csv_records(self.path, offset))).values)

    def _named(self, record: Record) -> Record:
        cells = record.values
        if isinstance(cells, Rejected):
            return record
        if any(cell.strip() for cell in cells[self._n_cells :]):
            reason = f"line {record.line} has {len(cells)} cells, the header {self._n_cells}: put commas in quotes"
            return record._replace(values=Rejected("metadata", reason))
        pairs = ((name, cells[index].strip() if index < len(cells) else "")
                 for name, indices in self._columns.items() for index in indices)  # fmt: skip
        return record._replace(values=joined_values(pairs))


class JsonLines:
    """A file with a JSON object per line, UTF-8; `rename` as in `CsvTable`."""

    def __init__(self, path: Path, rename: Callable[[str], str] | None = None) -> None:
        self.path, self._rename = path, rename

    def __iter__(self) -> Iterator[Record]:
        """Records with values by key; blank lines are skipped."""
        offset = 0
        with open_table(self.path) as file:
            for number, line in enumerate(read_lines(file), 1):
                if stripped := line.removeprefix(_BOM).strip():
                    yield Record(number, offset, self._parsed(stripped, number))
                offset = file.tell() if len(line) > MAX_LINE else offset + len(line)

    def at(self, offset: int) -> dict[str, Any]:
        """The values of the record at a byte `offset`."""
        with open_table(self.path) as file:
            file.seek(offset)
            return good(self._parsed(next(read_lines(file)).removeprefix(_BOM), 0))

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return parse_object(line, self._rename)
        except Rejected as error:
            return Rejected(error.kind, f"line {number} {error.reason}")


def parse_object(data: bytes, rename: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Parse a JSON object; of a key that occurs several times, all values.

    Raises:
        Rejected: anything else: too long, not UTF-8, not JSON, nested too deeply.
    """
    if len(data) > MAX_LINE:
        raise Rejected("metadata", f"is longer than {MAX_LINE} bytes")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=joined_values)
    except UnicodeDecodeError as error:
        raise Rejected("metadata", NOT_UTF8) from error
    except (ValueError, RecursionError) as error:
        raise Rejected("metadata", "is no JSON that can be read") from error
    if not isinstance(found, dict):
        raise Rejected("metadata", "is no JSON object")
    return joined_values(((rename or column)(key), value) for key, value in found.items())


def joined_values(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by name; different values of one name become a list, without empty ones."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name not in values or values[name] in ("", None, []):
            values[name] = value
        elif value not in ("", None, []) and value != values[name]:
            first = values[name] if isinstance(values[name], list) else [values[name]]
            values[name] = [*first, *(value if isinstance(value, list) else [value])]
    return values


def column(name: str) -> str:
    """The normalised name of a column: lower case, British spelling."""
    return name.strip().lower().replace("license", "licence")


def text(value: Any) -> str:
    """A JSON string, number or null as stripped text. Raises Rejected for other types and lone surrogates."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise Rejected("metadata", f"holds a {type(value).__name__} instead of text")
    written = str(value).strip()
    try:
        written.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("metadata", "holds a lone surrogate, which is not valid text") from error
    return written


def texts(value: Any) -> list[str]:
    """A JSON list of texts, or one text, without empty and repeated ones. Raises as `text`."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(written for item in values if (written := text(item))))


def listed(cell: str) -> list[Any]:
    """A cell with a Python list such as `['low quality', 'slow tempo']`, or empty. Raises Rejected for others."""
    if not cell:
        return []
    if len(cell) > _MAX_LIST:
        raise Rejected("metadata", f"holds a list longer than {_MAX_LIST} characters")
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise Rejected("metadata", "holds a list that cannot be read") from error
    if not isinstance(found, list):
        raise Rejected("metadata", "holds something else instead of a list")
    return found


class Positions:
    """Positions of the records of each key in a file, at 24 bytes per record.

    Keys are 64-bit integers, such as hashes; a reader must check the key of the record it finds.
    """

    def __init__(self) -> None:
        self._keys, self._offsets, self._lines = array("q"), array("q"), array("q")
        self._sorted = True

    def add(self, key: int, offset: int, line: int) -> None:
        """Add the byte and the line of a record."""
        self._keys.append(key)
        self._offsets.append(offset)
        self._lines.append(line)
        self._sorted = False

    def find(self, key: int) -> list[tuple[int, int]]:
        """(offset, line) of every record of `key`, in the order they were added."""
        found = []
        index = self._find(key)
        while index < len(self._keys) and self._keys[index] == key:
            found.append((self._offsets[index], self._lines[index]))
            index += 1
        return found

    def first(self, key: int) -> int:
        """Offset of the first record of a known key."""
        return self._offsets[self._find(key)]

    def _find(self, key: int) -> int:
        if not self._sorted:
            self._sort()
        return bisect_left(self._keys, key)

    def _sort(self) -> None:
        import numpy as np

        order = np.argsort(np.frombuffer(self._keys, np.int64), kind="stable")
        columns = (self._keys, self._offsets, self._lines)
        self._keys, self._offsets, self._lines = (
            array("q", np.frombuffer(values, np.int64)[order].tobytes()) for values in columns
        )
        self._sorted = True


class _Lines:
    """Lines for csv.reader, with the offset of the next line and the problem of the last record."""

    def __init__(self, file: BinaryIO) -> None:
        self.offset, self.number = file.tell(), 0
        self._file, self._lines = file, read_lines(file)
        self._parts: deque[bytes] = deque()
        self._too_long = self._ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._parts:
            line = next(self._lines, b"")
            self._ended = not line
            if not line:
                raise StopIteration
            if len(line) > MAX_LINE:
                self._too_long, self.offset, self.number = True, self._file.tell(), self.number + 1
                return "\n"
            self._parts.extend(part for part in _LONE_CR.split(line) if part)
        part = self._parts.popleft()
        at_start = self.offset == 0
        self.offset, self.number = self.offset + len(part), self.number + 1
        return (part.removeprefix(_BOM) if at_start else part).decode("utf-8", "surrogateescape")

    def problem(self, cells: list[str]) -> str | None:
        """What is wrong with the record just read, or None."""
        too_long, self._too_long = self._too_long, False
        if too_long:
            return f"is longer than {MAX_LINE} bytes"
        if self._ended:
            return "opens a quotation mark that is never closed"
        joined = "".join(cells)
        if "\0" in joined:
            return "holds NUL bytes"
        try:
            joined.encode("utf-8")
        except UnicodeEncodeError:
            return NOT_UTF8
        return None


def open_table(path: Path) -> BinaryIO:
    """Open a table for reading. Raises UserError if that fails."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
