"""Shard tasks on a Ray cluster of this machine whose workers and nodes are killed."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_preparation import ENVIRONMENT, ROOT, check_equal, command, files, prepare, read_proc, small_folder
from small_shards import kill_worker

from data_prep.run import Run
from data_prep.shard_task import ShardTask
from ssmttm.errors import Preempted, UserError
from ssmttm.launch.ray import RayExecutor

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(400)
START_SECONDS = 120  # limit for the start of a node, which takes 4 s
N_CPUS, MEMORY = 2, 80_000_000  # of a node, and bytes of its object store
HEAD = f"""
import sys, ray
ray.init(num_cpus={N_CPUS}, object_store_memory={MEMORY}, include_dashboard=False, log_to_driver=False,
         _temp_dir=sys.argv[1])
print("address=" + ray.get_runtime_context().gcs_address + "\\n", flush=True)
sys.stdin.read()
"""


def slow_file(index: int, seconds: float, folder: Path) -> dict[str, float]:
    """A slow shard that logs its process and node."""
    with open(folder.parent.parent / "started.log", "a") as log:
        log.write(f"{index} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
    time.sleep(seconds)
    (folder / "text").write_text(f"shard {index}")
    return {"segments": 1}


def reject(folder: Path) -> dict[str, float]:
    raise UserError("what, where, what to do")


def stop(folder: Path) -> dict[str, float]:
    raise Preempted("run it again")


def slow_tasks(root: Path, n: int, seconds: float) -> list[ShardTask]:
    return [ShardTask(root / "cut-0" / f"{i:05d}", f"in{i}", partial(slow_file, i, seconds)) for i in range(n)]


def one_task(root: Path, make: Callable[[Path], Any]) -> list[ShardTask]:
    return [ShardTask(root / "cut-0" / "00000", "x", make)]


def workers_of(raylet: int) -> list[int]:
    """The busy processes of a node: `ray::_call` runs a task."""
    pids = []
    for path in Path(f"/proc/{raylet}/task").glob("*/children"):
        for pid in read_proc(path).split():
            if read_proc(Path(f"/proc/{pid}/cmdline")).startswith("ray::_call"):
                pids.append(int(pid))
    return pids


@dataclass(frozen=True)
class Cluster:
    """The address of a cluster, and the process that started its first node."""

    address: str
    head: subprocess.Popen


def raylet_of(starter: subprocess.Popen) -> int:
    """The process of a node, a child of the one that started it."""
    children = [pid for path in Path(f"/proc/{starter.pid}/task").glob("*/children") for pid in read_proc(path).split()]
    (raylet,) = (pid for pid in children if "raylet/raylet" in read_proc(Path(f"/proc/{pid}/cmdline")).split("\0")[0])
    return int(raylet)


@contextmanager
def node(command: list[str], log: Path, is_up: Callable[[], bool]) -> Iterator[subprocess.Popen]:
    """A process that starts a node, ready when `is_up()`; it ends, with the node, when its standard input closes."""
    environment = ENVIRONMENT | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "RAY_health_check_period_ms": "500",
        "RAY_worker_niceness": "0",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                what = f"did not start within {START_SECONDS} s" if process.poll() is None else "ended at its start"
                process.kill()
                pytest.fail(f"the Ray node {what}:\n{log.read_text()[-3000:]}", pytrace=False)
            time.sleep(0.1)
        yield process
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with one node of two CPUs, started as `ray.init` starts it for a user."""
    log = tmp_path_factory.mktemp("ray") / "head.log"

    def address() -> str:
        return log.read_text().partition("address=")[2].partition("\n")[0]

    with (
        tempfile.TemporaryDirectory(prefix="r") as place,  # a short path, as that of a socket is limited
        node([sys.executable, "-c", HEAD, place], log, lambda: bool(address())) as head,
    ):
        yield Cluster(address(), head)
        ray.shutdown()


@pytest.fixture
def second_node(cluster, tmp_path) -> Iterator[subprocess.Popen]:
    """One more node in the cluster, for one test."""
    options = ["--num-cpus", str(N_CPUS), "--object-store-memory", str(MEMORY), "--disable-usage-stats", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster.address, *options]
    log = tmp_path / "second.log"
    with node(command, log, lambda: "Ray runtime started" in log.read_text()) as process:
        yield process
        process.terminate()


def check_shards(root: Path, n: int) -> None:
    """Every shard exists, complete, once."""
    assert [path.name for path in sorted((root / "cut-0").iterdir())] == [f"{i:05d}" for i in range(n)]
    for i in range(n):
        assert (root / "cut-0" / f"{i:05d}" / "text").read_text() == f"shard {i}"


def started(root: Path) -> list[list[str]]:
    log = root / "started.log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("device", [False, True])
def test_ray_executor_survives_killed_workers(cluster, tmp_path, device):
    """A busy process is killed up to eight times."""
    root, killed, over = tmp_path / "work", [], threading.Event()

    def kill() -> None:
        rng = random.Random(3)
        while not over.is_set() and len(killed) < 8:
            time.sleep(rng.uniform(0.1, 0.9))
            busy = workers_of(raylet_of(cluster.head))
            if len(killed) % 2:  # every second one in the midst of a shard, not while it imports
                busy = [pid for pid in busy if str(pid) in {worker for _, worker, _ in started(root)}]
            if busy:
                os.kill(busy[-1], signal.SIGKILL)
                killed.append(busy[-1])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = Run(root, RayExecutor(cluster.address)).run_stage("cut", slow_tasks(root, 12, 0.7), device)
    over.set()
    killer.join()
    assert len(done) == 12 and len(killed) >= 4, killed
    assert len(started(root)) > 12
    check_shards(root, 12)


def test_preparation_on_ray_with_killed_workers_gives_the_same_store(cluster, tmp_path):
    """Byte for byte, whatever the workers do when they are killed."""
    root = small_folder(tmp_path / "music")
    prepare(root, tmp_path / "expected" / "store")
    words = command(root, tmp_path / "store", "--executor", "ray", "--ray-address", cluster.address)
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    rng, killed = random.Random(4), []
    while run.poll() is None:
        time.sleep(rng.uniform(0.2, 1.5))
        busy = workers_of(raylet_of(cluster.head))
        if busy and len(killed) < 6:
            killed.append(rng.choice(busy))
            with suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)
    assert run.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert len(killed) == 6
    check_equal(tmp_path / "store", files(tmp_path / "expected" / "store"))


def test_ray_executor_survives_the_loss_of_a_node(cluster, second_node, tmp_path):
    second = raylet_of(second_node)
    assert second != raylet_of(cluster.head)
    root, lost = tmp_path / "work", []

    def kill() -> None:
        while len({node for _, _, node in started(root)}) < 2 or len(started(root)) < 8:
            time.sleep(0.1)
        lost.append(len(started(root)))
        os.kill(second, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = Run(root, RayExecutor(cluster.address)).run_stage("cut", slow_tasks(root, 16, 0.8))
    killer.join()
    assert len(done) == 16 and lost
    nodes = [node for _, _, node in started(root)]
    assert len(set(nodes)) == 2 and len(set(nodes[-6:])) == 1, "the last ones ran on the node that is left"
    check_shards(root, 16)


@pytest.mark.parametrize("device", [False, True])
def test_ray_executor_gives_up_on_a_task_that_kills_every_worker(cluster, tmp_path, device):
    with pytest.raises(UserError, match="a worker was lost 2 times over one task of cut-0"):
        Run(tmp_path, RayExecutor(cluster.address, retries=1)).run_stage("cut", one_task(tmp_path, kill_worker), device)


def test_ray_executor_reports_a_missing_cluster_at_once(tmp_path):
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:9"), RayExecutor("127.0.0.1:9") as executor:
        Run(tmp_path, executor).run_stage("cut", slow_tasks(tmp_path, 1, 0.0))


def test_ray_executor_raises_the_exception_of_a_task(cluster, tmp_path):
    with pytest.raises(TypeError, match="unsupported operand"):
        Run(tmp_path, RayExecutor(cluster.address)).run_stage("cut", one_task(tmp_path, partial(divmod, 1)))
    with pytest.raises(UserError) as mistake:
        Run(tmp_path, RayExecutor(cluster.address)).run_stage("cut", one_task(tmp_path, reject))
    assert str(mistake.value) == "what, where, what to do"
    with pytest.raises(Preempted, match="again"):
        Run(tmp_path, RayExecutor(cluster.address)).run_stage("cut", one_task(tmp_path, stop))
