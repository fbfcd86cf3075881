"""A preparation that is killed at random moments, again and again, gives the same store as one that never was."""

import random
import signal
import subprocess
from pathlib import Path

import pytest
from unbroken import ENVIRONMENT, ROOT, command, files, prepare, same, small_folder

from data_prep.engine.status import WORK

pytestmark = pytest.mark.timeout(900)
KILLS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("kills") / "music")


@pytest.fixture(scope="module")
def unbroken(root) -> dict[str, bytes]:
    prepare(root, root.parent / "unbroken")
    return files(root.parent / "unbroken")


def start(root: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(command(root, out), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def test_the_run_itself_is_killed(root, unbroken, tmp_path):
    """Each time in another stage, as time is counted from the first shard on; a finished store is begun anew."""
    rng, killed, out = random.Random(7), 0, tmp_path / "store"
    while killed < KILLS:
        run = start(root, out)
        while run.poll() is None and not (out / WORK / "stages.json").exists():
            pass
        try:
            run.wait(rng.uniform(0.0, 12.0))
            assert run.returncode == 0
            same(out, unbroken)
            out = tmp_path / f"store {killed}"
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
    prepare(root, out)
    same(out, unbroken)


def test_its_workers_are_killed(root, unbroken, tmp_path):
    """One of its processes after the other, which the run itself replaces."""
    rng, out = random.Random(8), tmp_path / "store"
    run, killed = start(root, out), 0
    while run.poll() is None:
        try:
            run.wait(rng.uniform(0.5, 4.0))
        except subprocess.TimeoutExpired:
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if workers and killed < 8:
                subprocess.run(["kill", "-KILL", rng.choice(workers)], check=False)
                killed += 1
    assert run.returncode == 0 and killed >= 3
    same(out, unbroken)
