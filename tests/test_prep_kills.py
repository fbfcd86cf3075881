"""A preparation that is killed at random moments, again and again, gives the same store as one that never was."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from unbroken import ENVIRONMENT, ROOT, command, files, prepare, same, small_folder, told

from data_prep.status import WORK

pytestmark = pytest.mark.timeout(900)
KILLS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("kills") / "music")


@pytest.fixture(scope="module")
def unbroken(root) -> dict[str, bytes]:
    prepare(root, root.parent / "store")
    return files(root.parent / "store")


def children(pid: int) -> list[str]:
    """The processes that a process has begun, from any of its threads."""
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in told(path).split()]


def command_of(pid: str) -> bytes:
    return told(Path(f"/proc/{pid}/cmdline")).encode()


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
            out = tmp_path / f"{killed}" / "store"
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
    prepare(root, out)
    same(out, unbroken)


def test_its_workers_are_killed(root, unbroken, tmp_path):
    """One of its processes whenever a shard was finished, which the run itself replaces."""
    rng, out = random.Random(8), tmp_path / "store"
    run, killed, seen = start(root, out), 0, 0
    while run.poll() is None:
        finished = len(list((out / WORK).glob("*/*/done.json")))
        workers = [pid for pid in children(run.pid) if b"spawn_main" in command_of(pid)]
        if workers and finished > seen and killed < 8:
            subprocess.run(["kill", "-KILL", rng.choice(workers)], check=False)
            killed, seen = killed + 1, finished
        time.sleep(rng.uniform(0.0, 0.2))
    assert run.returncode == 0 and killed >= 3
    same(out, unbroken)
