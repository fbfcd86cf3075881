"""A preparation killed at random times, many times, gives the same store as one that was never killed."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_preparation import ENVIRONMENT, ROOT, check_equal, command, files, prepare, read_proc, small_folder

from data_prep.status import WORK

pytestmark = pytest.mark.timeout(600)
KILLS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("kills") / "music")


@pytest.fixture(scope="module")
def expected(root) -> dict[str, bytes]:
    prepare(root, root.parent / "store")
    return files(root.parent / "store")


def children(pid: int) -> list[str]:
    """Child processes of any of its threads."""
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in read_proc(path).split()]


def command_of(pid: str) -> bytes:
    return read_proc(Path(f"/proc/{pid}/cmdline")).encode()


def start(root: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(command(root, out), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def test_run_killed_at_random_times_gives_the_same_store(root, expected, tmp_path):
    """Times are counted from the first shard on, so that each kill hits another stage; a finished store starts over."""
    rng, killed, out = random.Random(7), 0, tmp_path / "store"
    while killed < KILLS:
        stages = out / WORK / "stages.json"  # only `status` reads it
        stages.unlink(missing_ok=True)
        run = start(root, out)
        while run.poll() is None and not stages.exists():
            time.sleep(0.01)
        try:
            run.wait(rng.uniform(0.0, 5.0))
            assert run.returncode == 0
            check_equal(out, expected)
            out = tmp_path / f"{killed}" / "store"
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
    prepare(root, out)
    check_equal(out, expected)


def test_run_with_killed_workers_gives_the_same_store(root, expected, tmp_path):
    """Kill a worker whenever a shard is finished; the run replaces it."""
    rng, out = random.Random(8), tmp_path / "store"
    run, killed, finished_before = start(root, out), 0, 0
    while run.poll() is None:
        finished = len(list((out / WORK).glob("*/*/done.json")))
        workers = [pid for pid in children(run.pid) if b"spawn_main" in command_of(pid)]
        if workers and finished > finished_before and killed < 4:
            subprocess.run(["kill", "-KILL", rng.choice(workers)], check=False)
            killed, finished_before = killed + 1, finished
        time.sleep(rng.uniform(0.0, 0.2))
    assert run.returncode == 0 and killed >= 3
    check_equal(out, expected)
