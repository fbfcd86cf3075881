"""Audio files under a folder, and paths that tables name."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

EXTENSIONS = {
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aiff", ".aif",
    ".aifc", ".au", ".snd", ".caf", ".voc",  # so far libsndfile reads them, from here on FFmpeg
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".ac3", ".eac3", ".wma", ".asf", ".webm", ".mka", ".mkv",
    ".ape", ".wv", ".tta", ".tak", ".mpc", ".ra", ".amr", ".dsf", ".dff",
}  # fmt: skip
_STORE = {"store.json", "prep.json"}


def check_root(root: Path) -> None:
    """Raises UserError unless `root` is a folder."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the folder of the data set as --root")


def folders(root: Path) -> Iterator[tuple[str, list[str]] | Rejection]:
    """Every folder under `root`, itself included: its path relative to `root` ("" for `root`), and its files' names.

    Both are in the order of their names. Hidden files and folders are left out, and so are stores. Links to files are
    listed as files; links to folders are not followed.
    """
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(root / inside) as entries:
                found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=_name)
        except OSError as error:
            yield Rejection(inside or ".", "unreadable", f"the folder cannot be read ({error.strerror})")
            continue
        names = [entry.name for entry in found if not entry.is_dir()]
        if inside and not _STORE.isdisjoint(names):
            continue
        yield inside, names
        for entry in reversed(found):
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_dir():
                yield Rejection(path, "outside", "it is a link to a folder, which is not followed")


def audio_files(root: Path) -> Iterator[str]:
    """Paths of the audio files under `root`, relative to it."""
    for found in folders(root):
        if not isinstance(found, Rejection):
            inside, names = found
            prefix = f"{inside}/" if inside else ""
            yield from (prefix + name for name in names if is_audio(name))


def is_audio(name: str) -> bool:
    """Whether a file's name ends as that of an audio file."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def within(path: str) -> str:
    """A path that a table names, without `.` and doubled slashes.

    Raises:
        Refused: none, absolute, or with `..`.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise Rejected("metadata", "it names no file")
    if path.startswith("/") or ".." in parts:
        raise Rejected("outside", "it is named outside the folder")
    return "/".join(parts)


def first_present(root: Path, candidates: list[str]) -> str | None:
    """The first of some paths relative to `root` that is a file."""
    base = os.fspath(root)
    return next((path for path in candidates if os.path.isfile(f"{base}/{path}")), None)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
