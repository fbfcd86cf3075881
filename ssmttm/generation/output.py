"""Output files of sampling: audio, and a JSON sidecar with its metadata beside it."""

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
MARK = "digitalSourceType"  # IPTC's term for the origin of a work; identifies our sidecars


class OutputPath:
    """Where audio is written: one named file, which is overwritten, or a folder, where nothing is overwritten. Raises
    UserError if the format is unknown or not that of the file, there are several prompts for one file, or the folder
    cannot be written."""

    def __init__(self, out: str | Path, n_prompts: int, file_format: str | None = None) -> None:
        """`file_format`: None is that of the file, wav in a folder."""
        path = Path(out)
        suffix = path.suffix.lower()
        is_folder = path.is_dir() or str(out).endswith(("/", os.sep)) or not suffix
        if n_prompts > 1 and not is_folder:
            if path.exists() or suffix in FORMATS:
                raise UserError(f"--out {path} is one file, but there are {n_prompts} prompts: give a folder")
            is_folder = True
        self.file = None if is_folder else path
        self.folder = path if is_folder else path.parent
        wanted = None if file_format is None else f".{file_format.lower().lstrip('.')}"
        self.suffix = (wanted or ".wav") if is_folder else suffix
        if self.suffix not in FORMATS:
            raise UserError(f"unknown audio format {self.suffix!r} ({out}): choose from {', '.join(FORMATS)}")
        if wanted not in (None, self.suffix):
            raise UserError(f"--out {out} and --format {file_format} differ: leave one of them out")
        if self.file is not None:
            _check_own_sidecar(sidecar_path(self.file))
        _check_writable(self.folder)

    def save(self, prompt: str, wav: Tensor, sample_rate: int, metadata: dict[str, Any]) -> Path:
        """Write audio [C, S] and its sidecar, each atomically. Returns the path of the audio."""
        if self.file is not None:
            write_with_sidecar(self.file, wav, sample_rate, metadata)
            return self.file
        with _reserve_name(self.folder, slug(prompt), self.suffix) as path:
            write_with_sidecar(path, wav, sample_rate, metadata)
        return path


def slug(prompt: str, longest: int = 48) -> str:
    """A file name from a prompt: letters (with their marks) and digits of any script, words joined by hyphens."""
    name = ""
    for character in unicodedata.normalize("NFC", prompt).lower():
        in_word = name[-1:] not in ("", "-")
        if character.isalnum() or (in_word and unicodedata.category(character).startswith("M")):
            name += character
        elif in_word:
            name += "-"
    return name[:longest].strip("-") or "music"


def sidecar(prompt: str, seed: int, settings: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of a sidecar: everything needed to generate the clip again, and its provenance."""
    return {
        "prompt": prompt, "seed": seed, **settings, **metadata, MARK: "trainedAlgorithmicMedia",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def sidecar_path(path: Path) -> Path:
    """The sidecar of an audio file: take.json of take.wav, but take.wav.json if take.json is that of take.mp3."""
    short, long = path.with_suffix(".json"), path.with_name(f"{path.name}.json")
    return long if long.exists() or _is_of_another(short, path) else short


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of an audio file; empty if there is none or it is damaged."""
    return _read(sidecar_path(path))


def write_with_sidecar(path: Path, wav: Tensor, sample_rate: int, metadata: dict[str, Any]) -> None:
    """Write audio [C, S], then its sidecar, each atomically."""
    audio.write(path, wav, sample_rate)
    content = {"file": path.name} | metadata
    write_text(sidecar_path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_of_another(sidecar: Path, path: Path) -> bool:
    """Whether a sidecar is that of another audio file, which is still there; a renamed pair has an old `file`."""
    name = _read(sidecar).get("file")
    if not isinstance(name, str) or name == path.name or Path(name).name != name:
        return False
    other = path.with_name(name)
    return other.is_file() and sidecar.name in (other.with_suffix(".json").name, f"{name}.json")


@contextmanager
def _reserve_name(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """The first free name stem.suffix, stem-2.suffix, ..., reserved by an empty file that is removed on failure."""
    number = 1
    while True:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        number += 1
        if path.with_suffix(".json").exists():  # also of a file of another format
            continue
        try:
            path.open("x").close()
            break
        except FileExistsError:
            continue
    try:
        yield path
    finally:
        if path.stat().st_size == 0:  # the placeholder
            path.unlink()


def _check_own_sidecar(path: Path) -> None:
    """A sidecar may be overwritten with its audio; another program's JSON of the same name may not."""
    if not path.exists():
        return
    try:
        ours = MARK in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{path} exists and is not a sidecar of ssmttm: choose another --out, or move it")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another place with --out") from error
