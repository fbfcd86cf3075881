"""Audio files in a folder, and paths in tables."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

EXTENSIONS = {
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aiff", ".aif",
    ".aifc", ".au", ".snd", ".caf", ".voc",  # by libsndfile; the others by FFmpeg
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".ac3", ".eac3", ".wma", ".asf", ".webm", ".mka", ".mkv",
    ".ape", ".wv", ".tta", ".tak", ".mpc", ".ra", ".amr", ".dsf", ".dff",
}  # fmt: skip
_STORE = {"store.json", "prep.json"}


def check_root(root: Path) -> None:
    """Raises UserError unless `root` is a folder."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the folder of the data set as --root")


def folders(root: Path) -> Iterator[tuple[str, list[str]] | Rejection]:
    """`root` and every folder below, sorted: relative path ("" for `root`), and the names of its files.

    Hidden files and folders, and stores, are ignored. Links to folders are not followed.
    """
    pending = [""]
    while pending:
        inside = pending.pop()
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
                pending.append(path)
            elif entry.is_dir():
                yield Rejection(path, "outside", "it is a link to a folder; links are not followed")


def audio_files(root: Path) -> Iterator[str]:
    """Relative paths of the audio files under `root`."""
    for found in folders(root):
        if not isinstance(found, Rejection):
            inside, names = found
            prefix = f"{inside}/" if inside else ""
            yield from (prefix + name for name in names if is_audio(name))


def is_audio(name: str) -> bool:
    """Whether a file name has an audio extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def within(path: str) -> str:
    """A path of a table without `.` and double slashes. Raises Rejected if it is empty, absolute or has `..`."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise Rejected("metadata", "it names no file")
    if path.startswith("/") or ".." in parts:
        raise Rejected("outside", "the path leads out of the folder")
    return "/".join(parts)


def first_present(root: Path, candidates: list[str]) -> str | None:
    """The first relative path that is a file."""
    base = os.fspath(root)
    return next((path for path in candidates if os.path.isfile(f"{base}/{path}")), None)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
