"""Checks of file names from tables and archives of others: they must stay inside their folder."""

import os
import unicodedata
from pathlib import Path

from data_prep.track import Rejected

_MAX_PART_BYTES, _MAX_BYTES = 255, 4096  # limits of the file system


def inside(root: Path, name: str) -> Path:
    """The path of a relative name with `/`; it need not exist. Links inside `root` are followed.

    Raises:
        Rejected: outside (absolute, `..`, or a link out of `root`), or metadata (empty, control characters, too long).
    """
    check_name(name)
    path = root / name
    try:
        resolved, resolved_root = os.path.realpath(path), os.path.realpath(root)
    except OSError as error:
        raise Rejected("metadata", f"the path cannot be resolved ({error.strerror})") from error
    if not Path(resolved).is_relative_to(resolved_root):
        raise Rejected("outside", "the path leads out of the folder by a link")
    return path


def check_name(name: str) -> None:
    """Raises Rejected, as `inside`, for a name that is invalid whatever is on the disk."""
    parts = name.split("/")
    if name.startswith("/"):
        raise Rejected("outside", "the path is absolute")
    if ".." in parts:
        raise Rejected("outside", "the path contains `..`")
    if not name or all(part in ("", ".") for part in parts):
        raise Rejected("metadata", "the path names no file")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise Rejected("metadata", "the path contains control characters or invalid Unicode")
    if len(name.encode()) > _MAX_BYTES or max(len(part.encode()) for part in parts) > _MAX_PART_BYTES:
        raise Rejected("metadata", "the path is too long")


def printable(name: str) -> str:
    """The first 200 characters of a name for a message, with unprintable ones escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name[:200])
    return shown if len(name) <= 200 else f"{shown}..."
