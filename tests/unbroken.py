"""A small folder, the command that prepares it, and the store that comes of it when nothing is killed."""

import os
import subprocess
import sys
from pathlib import Path

from planted import RATE, music, save

from data_prep.status import WORK

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def small_folder(folder: Path) -> Path:
    """24 short pieces, one of them twice, and one that cannot be read."""
    for index in range(24):
        start = 8 * (index % 4) * RATE
        save(folder / f"{index:02d}.flac", music(index // 4)[start : start + 8 * RATE])
    (folder / "again.flac").write_bytes((folder / "03.flac").read_bytes())
    (folder / "broken.flac").write_bytes((folder / "04.flac").read_bytes()[:9000])
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    """Audio, codes and embeddings of 48 segments."""
    words = ["folder", "--root", root, "--out", out, "--licence", "CC0-1.0", "--segment", "5", "--workers", "2", *more]
    return [sys.executable, "-m", "data_prep", *map(str, words)]


def prepare(root: Path, out: Path) -> None:
    """Run the command to its end."""
    done = subprocess.run(command(root, out), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but those of the work."""
    found = (path for path in sorted(store.rglob("*")) if path.is_file() and WORK not in path.relative_to(store).parts)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in found}


def same(store: Path, unbroken: dict[str, bytes]) -> None:
    """Byte for byte, and nothing half-made is left."""
    found = files(store)
    assert found.keys() == unbroken.keys()
    assert [name for name in found if found[name] != unbroken[name]] == []
    assert not list((store / WORK).rglob("*.tmp*"))


def told(path: Path) -> str:
    """What /proc tells; nothing of a process that is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""
