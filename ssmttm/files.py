"""Atomic writes of files and folders, hashes, and lock files."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssmttm.errors import UserError


class DiskFull(UserError):
    """No space left on the device; files written before are intact."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is fsynced and renamed to `path` at the end, removed on any error.

    Raises DiskFull, or UserError if the folder cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; `publish_folder` is applied at the end, it is removed on any error.

    An existing folder at `path` is replaced, and restored if the rename fails. Raises as `atomic_write`.
    """
    temporary, replaced = temporary_path(path), temporary_path(path)
    try:
        with clear_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rename(replaced)
            publish_folder(temporary, path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def folder_update(folder: Path, last: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder inside an existing one; at the end its files and subfolders replace those of the folder.

    The files `last`, without which the folder cannot be read, are removed before the others are replaced, and put in
    place after them, in this order. So after a crash the folder is the old one, the new one, or lacks these; it never
    holds some files of each. Raises as `atomic_write`.
    """
    temporary = temporary_path(folder / "update")
    replaced = temporary / f".replaced.{uuid.uuid4().hex[:12]}"
    try:
        with clear_errors(folder):
            for path in folder.glob(".update.*.tmp"):  # of killed processes
                shutil.rmtree(path)
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                fsync(path)
            names = [path.name for path in temporary.iterdir() if path.name not in last]
            names += [name for name in last if (temporary / name).exists()]
            for name in reversed(last):
                (folder / name).unlink(missing_ok=True)
            fsync(folder)
            replaced.mkdir()
            for name in names:
                if (folder / name).is_dir():
                    (folder / name).rename(replaced / name)
                if name in last:
                    fsync(folder)
                os.replace(temporary / name, folder / name)
            fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`atomic_folder` for a new folder. Raises UserError if `path` exists."""
    if path.exists():
        raise UserError(f"{path} exists already: give the name of a new folder")
    with atomic_folder(path) as temporary:
        yield temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Fsync all of `temporary`, then rename it to `path`. Raises OSError if `path` is a non-empty folder."""
    for file in temporary.rglob("*"):
        fsync(file)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path`, with its suffix."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")


def clear_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder. No process may be writing there."""
    for path in folder.glob(".*.tmp*"):
        if path.is_file():
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as JSON: {"bytes": int, "sha256": hex}."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hex digits of the sha256 of a config's JSON; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def directory_lock(folder: Path, work: str) -> Iterator[None]:
    """Lock a folder for this process; the system releases the lock when the process ends.

    Raises UserError if another process holds it; `work`, such as "training", is for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another {work} is writing to {folder}: wait for it, or choose another folder") from error
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if not (folder / ".lock").is_file():
        return False
    with (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing `path` into errors for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full, {path} is not written: free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
        raise
