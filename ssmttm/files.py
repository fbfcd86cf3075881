"""Files written whole or not at all (a full disk is one clear line), and folders held by one process."""

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssmttm.errors import UserError


class DiskFull(UserError):
    """There is no room left; what was written before is whole."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: fsynced and renamed onto it at the end, removed on any error.

    Raises:
        DiskFull: nothing half-written is left.
        UserError: the folder cannot be written.
    """
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full while writing {path}: free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
        raise
    finally:
        with suppress(OSError):
            aside.unlink()


def clear_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` left half-written in a folder when its process was killed. Nobody may be writing."""
    for path in folder.glob(".*.tmp*"):
        if path.is_file():
            path.unlink()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or vanishes on any error.

    Raises:
        UserError: `out` is there already, or its place cannot be written to.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give the name of a new folder")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another place") from error
    try:
        yield aside
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def directory_lock(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it if the process dies.

    Raises:
        UserError: it cannot be written to, or another process holds it; `work`, such as "training", is what it is
            said to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another place") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another {work} is writing to {folder}: wait for it, or name another folder") from error
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder."""
    if not (folder / ".lock").is_file():
        return False
    with (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
