"""A small folder of audio, the command that prepares it, and comparison of stores."""

import os
import subprocess
import sys
from pathlib import Path

from planted import RATE, music, save

from data_prep.status import WORK

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def small_folder(folder: Path) -> Path:
    """12 short audio files, a duplicate, and one that cannot be decoded."""
    for index in range(12):
        start = 8 * (index % 4) * RATE
        save(folder / f"{index:02d}.flac", music(index // 4)[start : start + 8 * RATE])
    (folder / "again.flac").write_bytes((folder / "03.flac").read_bytes())
    (folder / "broken.flac").write_bytes((folder / "04.flac").read_bytes()[:9000])
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    """The command line for audio, codes and embeddings of 24 segments."""
    words = ["folder", "--root", root, "--out", out, "--licence", "CC0-1.0", "--segment", "5", "--workers", "2", *more]
    return [sys.executable, "-m", "data_prep", *map(str, words)]


def prepare(root: Path, out: Path) -> None:
    """Run the command."""
    result = subprocess.run(command(root, out), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def files(store: Path) -> dict[str, bytes]:
    """The bytes of every file of a store outside the work folder."""
    paths = (path for path in sorted(store.rglob("*")) if path.is_file() and WORK not in path.relative_to(store).parts)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


def check_equal(store: Path, expected: dict[str, bytes]) -> None:
    """The store has these files, byte for byte, and no temporary file is left."""
    actual = files(store)
    assert actual.keys() == expected.keys()
    assert [name for name in actual if actual[name] != expected[name]] == []
    assert not list((store / WORK).rglob("*.tmp*"))


def read_proc(path: Path) -> str:
    """A file of /proc; empty if the process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
