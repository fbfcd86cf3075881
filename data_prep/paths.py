"""File names out of other people's tables and archives: they stay inside their folder."""

import os
import unicodedata
from pathlib import Path

from data_prep.track import Rejected

_LONGEST_PART, _LONGEST = 255, 4096  # bytes, as the system's


def inside(root: Path, name: str) -> Path:
    """The file that a relative name with `/` stands for; it need not exist. Links that stay inside are followed.

    Raises:
        Refused: outside (absolute, `..`, or a link that leads out of `root`), or metadata (empty, or with characters
            that no honest name has, or too long).
    """
    check_name(name)
    path = root / name
    try:
        real, real_root = os.path.realpath(path), os.path.realpath(root)
    except OSError as error:
        raise Rejected("metadata", f"the path cannot be followed ({error.strerror})") from error
    if not Path(real).is_relative_to(real_root):
        raise Rejected("outside", "the path leads out of the folder by a link")
    return path


def check_name(name: str) -> None:
    """Raises Refused, as `inside`, for a name that is bad whatever lies on the disk."""
    parts = name.split("/")
    if name.startswith("/"):
        raise Rejected("outside", "the path is absolute")
    if ".." in parts:
        raise Rejected("outside", "the path holds `..`")
    if not name or all(part in ("", ".") for part in parts):
        raise Rejected("metadata", "the path names no file")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise Rejected("metadata", "the path holds control characters, or is no valid Unicode")
    if len(name.encode()) > _LONGEST or max(len(part.encode()) for part in parts) > _LONGEST_PART:
        raise Rejected("metadata", "the path is too long")


def printable(name: str) -> str:
    """A name for a message or a table, at most 200 characters of it; what cannot be shown is escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name[:200])
    return shown if len(name) <= 200 else f"{shown}..."
