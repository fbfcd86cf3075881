"""A preparation that is killed at random moments, again and again, gives the same store as one that never was."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from planted import RATE, music, save

from data_prep.engine.status import WORK

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[1]
KILLS = 20
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def command(root: Path, out: Path, *more: str) -> list[str]:
    words = ["folder", "--root", root, "--out", out, "--licence", "CC0-1.0", "--segment", "5", "--workers", "2", *more]
    return [sys.executable, "-m", "data_prep", *map(str, words)]


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but those of the work."""
    found = (path for path in sorted(store.rglob("*")) if path.is_file() and WORK not in path.relative_to(store).parts)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """24 short pieces, one of them twice, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("kills") / "music"
    for index in range(24):
        start = 5 * (index % 4) * RATE
        save(folder / f"{index:02d}.flac", music(index // 4)[start : start + 8 * RATE])
    (folder / "again.flac").write_bytes((folder / "03.flac").read_bytes())
    (folder / "broken.flac").write_bytes((folder / "04.flac").read_bytes()[:9000])
    return folder


@pytest.fixture(scope="module")
def unbroken(root) -> dict[str, bytes]:
    out = root.parent / "unbroken"
    subprocess.run(command(root, out), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return files(out)


def same(store: Path, unbroken: dict[str, bytes]) -> None:
    found = files(store)
    assert found.keys() == unbroken.keys()
    assert [name for name in found if found[name] != unbroken[name]] == []
    assert not list((store / WORK).rglob("*.tmp*"))


def test_the_run_itself_is_killed(root, unbroken, tmp_path):
    rng, killed = random.Random(7), 0
    out = tmp_path / "store"
    longest = 12.0
    while killed < KILLS:
        run = subprocess.Popen(command(root, out), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        try:
            run.wait(rng.uniform(1.0, longest))
            longest *= 0.8  # it came to its end: kill earlier, and from the start again
            assert run.returncode == 0
            same(out, unbroken)
            out = tmp_path / f"store {killed}"
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
    subprocess.run(command(root, out), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    same(out, unbroken)
