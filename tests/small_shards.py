"""Shard tasks that are small, slow, wrong or deadly, for tests of `data_prep.run` and its executors."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from data_prep.shard_task import ShardTask


def write_file(text: str, folder: Path) -> dict[str, float]:
    """Write one file and log it beside the stage."""
    with open(folder.parent.with_suffix(".log"), "a") as log:
        log.write(f"{text}\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "text").write_text(text)
    return {"segments": 1, "seconds": 2.0, "rejected": text.count("bad")}


def write_many_files(folder: Path, last: int = 99) -> dict[str, float]:
    """Write a hundred files."""
    for index in [*range(99), last]:
        (folder / f"{index}").write_text(f"{index}")
    return {}


def fail(folder: Path) -> dict[str, float]:
    """Raise after half of the work."""
    (folder / "half").write_text("half")
    raise ValueError("a bug")


def kill_worker_once(marker: Path, folder: Path) -> dict[str, float]:
    """Kill the process in which it runs, the first time."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_file("alive", folder)


def kill_worker(folder: Path) -> dict[str, float]:
    """Kill the process in which it runs."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wait_for_other(place: Path, index: int, folder: Path) -> dict[str, float]:
    """Write process id and threads, and wait until the other of two tasks has done so too."""
    place.mkdir(exist_ok=True)
    (place / f"{index}").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    deadline = time.monotonic() + 60
    while not (place / f"{1 - index}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return {}


def sleep_a_minute(index: int, folder: Path) -> dict[str, float]:
    """Write the process id and sleep."""
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def file_tasks(root: Path, n: int, stage: str = "cut") -> list[ShardTask]:
    """Tasks that write one file each."""
    folder = root / f"{stage}-0"
    return [ShardTask(folder / f"{i:05d}", f"in{i}", partial(write_file, f"{stage} {i}")) for i in range(n)]


def written(root: Path, stage: str = "cut") -> list[str]:
    """What `write_file` has logged, sorted."""
    log = root / f"{stage}-0.log"
    return sorted(log.read_text().splitlines()) if log.exists() else []
