"""The engine on Ray: real clusters on this machine, workers and a whole node killed; slow, as Ray is to start."""

import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from unbroken import ENVIRONMENT, ROOT, command, files, prepare, same, small_folder, told

from data_prep.run import Run
from data_prep.shard_task import ShardTask
from ssmttm.errors import UserError
from ssmttm.launch.shard_executors import Ray

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(600)
NODE = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}


def slow_file(index: int, seconds: float, folder: Path) -> dict[str, float]:
    """A shard that takes its time, and tells which process and node made it."""
    with open(folder.parent.parent / "begun.log", "a") as log:
        log.write(f"{index} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
    time.sleep(seconds)
    (folder / "text").write_text(f"shard {index}")
    return {"segments": 1}


def refuse(folder: Path) -> dict[str, float]:
    raise UserError("what, where, what to do")


def works(root: Path, n: int, seconds: float) -> list[ShardTask]:
    return [ShardTask(root / "cut-0" / f"{i:05d}", f"in{i}", partial(slow_file, i, seconds)) for i in range(n)]


def workers_of(raylet: int) -> list[int]:
    """The processes at work for a node: `ray::do` for a task, `ray::_Worker.do` for an actor's."""
    found = []
    for path in Path(f"/proc/{raylet}/task").glob("*/children"):
        for pid in told(path).split():
            if told(Path(f"/proc/{pid}/cmdline")).startswith(("ray::do", "ray::_W")):
                found.append(int(pid))
    return found


def raylet_of(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A cluster of its own, with one node of two processors."""
    from ray.cluster_utils import Cluster

    for name, value in (ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}).items():
        monkeypatch.setenv(name, value)
    patience = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    ray.shutdown()
    with tempfile.TemporaryDirectory(prefix="r") as place:  # apart from other clusters; a socket's path has a limit
        head = NODE | {"_system_config": patience, "temp_dir": place}
        whole = Cluster(initialize_head=True, head_node_args=head)
        yield whole
        ray.shutdown()
        whole.shutdown()


def made(root: Path, n: int) -> None:
    """Every shard is there, whole, once."""
    assert [path.name for path in sorted((root / "cut-0").iterdir())] == [f"{i:05d}" for i in range(n)]
    for i in range(n):
        assert (root / "cut-0" / f"{i:05d}" / "text").read_text() == f"shard {i}"


def begun(root: Path) -> list[list[str]]:
    log = root / "begun.log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("device", [False, True])
def test_workers_may_be_killed(cluster, tmp_path, device):
    """Twenty times a process at work is killed: as a task, and as an actor that holds a model."""
    root, killed, over = tmp_path / "work", [], threading.Event()

    def kill() -> None:
        rng = random.Random(3)
        while not over.is_set() and len(killed) < 20:
            time.sleep(rng.uniform(0.1, 0.9))
            busy = workers_of(raylet_of(cluster.head_node))
            if busy:
                os.kill(busy[-1], signal.SIGKILL)
                killed.append(busy[-1])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = Run(root, Ray(cluster.address)).stage("cut", works(root, 24, 0.7), device)
    over.set()
    killer.join()
    assert len(done) == 24 and len(killed) >= 10, killed
    assert len(begun(root)) > 24
    made(root, 24)


def test_the_workers_of_a_preparation_are_killed(cluster, tmp_path):
    """Whatever they do, from the second on; the store is the one that nothing was killed for, byte for byte."""
    root = small_folder(tmp_path / "music")
    prepare(root, tmp_path / "unbroken" / "store")
    words = command(root, tmp_path / "store", "--executor", "ray", "--ray-address", cluster.address)
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    rng, killed = random.Random(4), []
    while run.poll() is None:
        time.sleep(rng.uniform(0.2, 1.5))
        busy = workers_of(raylet_of(cluster.head_node))
        if busy and len(killed) < 20:
            killed.append(rng.choice(busy))
            with suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)
    assert run.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert len(killed) == 20
    same(tmp_path / "store", files(tmp_path / "unbroken" / "store"))


def test_a_cluster_of_two_nodes_loses_one(cluster, tmp_path):
    second = raylet_of(cluster.add_node(**NODE))
    assert second != raylet_of(cluster.head_node)
    root, lost = tmp_path / "work", []

    def kill() -> None:
        while len({node for _, _, node in begun(root)}) < 2 or len(begun(root)) < 8:
            time.sleep(0.1)
        lost.append(len(begun(root)))
        os.kill(second, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = Run(root, Ray(cluster.address)).stage("cut", works(root, 24, 0.8))
    killer.join()
    assert len(done) == 24 and lost
    nodes = [node for _, _, node in begun(root)]
    assert len(set(nodes)) == 2 and len(set(nodes[-6:])) == 1, "the last ones ran on the node that is left"
    made(root, 24)


def die(folder: Path) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_shard_that_kills_every_worker_ends_the_run_in_one_line(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("ssmttm.launch.shard_executors._RETRIES", 1)
    with pytest.raises(UserError, match="a worker was lost 2 times over one shard"):
        Run(tmp_path, Ray(cluster.address)).stage("cut", [ShardTask(tmp_path / "cut-0" / "00000", "x", die)])


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:9"), Ray("127.0.0.1:9") as executor:
        Run(tmp_path, executor).stage("cut", works(tmp_path, 1, 0.0))


def test_a_shard_that_fails_ends_the_run_as_it_would_here(cluster, tmp_path):
    with pytest.raises(TypeError, match="unsupported operand"):
        Run(tmp_path, Ray(cluster.address)).stage("cut", [ShardTask(tmp_path / "cut-0" / "00000", "x", partial(divmod, 1))])
    with pytest.raises(UserError) as mistake:
        Run(tmp_path, Ray(cluster.address)).stage("cut", [ShardTask(tmp_path / "cut-0" / "00000", "x", refuse)])
    assert str(mistake.value) == "what, where, what to do"
