"""The files that sampling writes: their names, and each audio file with its record beside it."""

import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import write_text

FORMATS = tuple(audio.WRITERS)
MARK = "digitalSourceType"  # IPTC's term for how a work came about; also how a record of ours is recognised


class OutputPath:
    """Where audio goes: one named file, which is overwritten, or a folder, in which nothing is.

    Making one checks everything that can be checked before sampling: the format, the number of files, that the folder
    can be written.

    Raises:
        UserError: one of these fails.
    """

    def __init__(self, out: str | Path, n_prompts: int, folder_format: str = "wav") -> None:
        path = Path(out)
        suffix = path.suffix.lower()
        is_folder = path.is_dir() or str(out).endswith(("/", os.sep)) or not suffix
        if n_prompts > 1 and not is_folder:
            if path.exists() or suffix in FORMATS:
                raise UserError(f"--out {path} names one file, but there are {n_prompts} prompts: give a folder")
            is_folder = True
        self.file = None if is_folder else path
        self.folder = path if is_folder else path.parent
        self.suffix = f".{folder_format.lower().lstrip('.')}" if is_folder else suffix
        if self.suffix not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"unknown audio format {self.suffix!r} ({out}): the formats are {known}")
        if self.file is not None:
            _check_own_sidecar(self.file.with_suffix(".json"))
        _check_writable(self.folder)

    def save(self, prompt: str, wav: Tensor, sample_rate: int, record: dict[str, Any]) -> Path:
        """Write audio [C, S] and its record (the same name with .json), each whole or not at all.

        Returns:
            The audio file.
        """
        if self.file is not None:
            _write_pair(self.file, wav, sample_rate, record)
            return self.file
        with _reserved(self.folder, slug(prompt), self.suffix) as path:
            _write_pair(path, wav, sample_rate, record)
        return path


def slug(prompt: str, longest: int = 48) -> str:
    """A file name out of a prompt: letters (with their marks) and digits of any script, words joined by hyphens."""
    name = ""
    for character in unicodedata.normalize("NFC", prompt).lower():
        in_word = name[-1:] not in ("", "-")
        if character.isalnum() or (in_word and unicodedata.category(character).startswith("M")):
            name += character
        elif in_word:
            name += "-"
    return name[:longest].strip("-") or "music"


def sidecar_path(prompt: str, seed: int, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What stands in the JSON beside an audio file: enough to make it again and to say what it is."""
    return {
        "prompt": prompt,
        "seed": seed,
        **settings,
        **facts,
        MARK: "trainedAlgorithmicMedia",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_sidecar(path: Path) -> dict[str, Any]:
    """The record beside an audio file; empty if there is none, or it is no record."""
    file = path.with_suffix(".json")
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_pair(path: Path, wav: Tensor, sample_rate: int, record: dict[str, Any]) -> None:
    audio.write(path, wav, sample_rate)
    record = {"file": path.name} | record
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _reserved(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """The first free name stem.suffix, stem-2.suffix, ..., held by an empty file, which goes again if writing fails."""
    number = 1
    while True:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        number += 1
        if path.with_suffix(".json").exists():
            continue
        try:
            path.open("x").close()
            break
        except FileExistsError:
            continue
    try:
        yield path
    finally:
        if path.stat().st_size == 0:  # still the placeholder
            path.unlink()


def _check_own_sidecar(path: Path) -> None:
    """A record may be overwritten with its audio; another program's JSON of the same name may not."""
    if not path.exists():
        return
    try:
        ours = MARK in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{path} is in the way and was not written here: choose another name for --out, or move it")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): choose another place with --out") from error
