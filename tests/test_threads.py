"""How torch's threads are chosen and wait, and what the programs import."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssmttm import threads

ROOT = Path(__file__).parents[1]


@pytest.fixture
def two_threads(monkeypatch) -> Iterator[None]:
    for name in (*threads._COUNT, *threads._WAITING):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_number_of_threads_set_by_the_user_stays(two_threads, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setenv(name, "2")
        threads.use_threads(1)
        assert torch.get_num_threads() == 2
    threads.use_threads_for_sampling()
    assert torch.get_num_threads() == 1
    threads.use_threads_for_sampling(10**9)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0)), "a large model"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_waiting_set_by_the_user_stays(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, "active" if name == "OMP_WAIT_POLICY" else "5000")
    with threads.spin_when_alone():
        assert "spin_when_alone" not in names()


def test_threads_stop_spinning_while_others_use_their_processors(two_threads, monkeypatch):
    """Measurements in turn: quiet; busy; quiet, once with an idle process in between; then the end."""
    monkeypatch.setattr(threads, "_processors", lambda: 2)
    times, others, computed = [(0.0, 0.0, 0.0)], 0.0, 0.0
    measured = [(0.0, 2.0), (0.5, 1.0), *[(0.0, 2.0)] * 5, (0.0, 0.0), *[(0.0, 2.0)] * 4, (0.0, 2.0)]
    for index, (used, computes) in enumerate(measured):
        others, computed = others + used, computed + computes
        times.append((index + 1.0, computed, others))
    seen, done, last = [], threading.Event(), times[-1]

    def next_times() -> tuple[float, float, float]:
        seen.append("idle OpenMP team" in names())
        if not times:
            done.set()
        return times.pop(0) if times else last

    monkeypatch.setattr(threads, "_times", next_times)
    monkeypatch.setattr(threads, "_INTERVAL", 0.001)
    with threads.spin_when_alone():
        assert done.wait(20)
    assert seen[:15] == [False] * 3 + [True] * 11 + [False], "a team from the busy measurement on, for ten quiet ones"
    assert not names() & {"idle OpenMP team", "spin_when_alone"}


def test_one_thread_needs_no_team(two_threads, monkeypatch):
    torch.set_num_threads(1)
    times = iter([(float(second), 0.0, float(second)) for second in range(1000)])
    monkeypatch.setattr(threads, "_times", lambda: next(times, (1e9, 0.0, 1e9)))
    monkeypatch.setattr(threads, "_INTERVAL", 0.001)
    with threads.spin_when_alone():
        for _ in range(20):
            threading.Event().wait(0.002)
            assert "idle OpenMP team" not in names()


@pytest.mark.skipif(not threads._STATISTICS.exists(), reason="no /proc/stat")
def test_busy_seconds_count_what_other_processes_use():
    """A process that computes for a second on the processor of this one, which sleeps."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        before, used = threads.busy_seconds(), os.times().children_user
        code = "import time\nwhile time.process_time() < 0.5: pass"
        subprocess.run([sys.executable, "-S", "-c", code], check=True)
        assert threads.busy_seconds() - before > 0.9 * (os.times().children_user - used) - 0.05
    finally:
        os.sched_setaffinity(0, own)


def test_others_on_processors_that_torch_leaves_free_change_nothing(two_threads, monkeypatch):
    times = iter([(float(second), 0.0, 0.5 * second) for second in range(1000)])
    monkeypatch.setattr(threads, "_times", lambda: next(times, (1e9, 0.0, 0.5e9)))
    monkeypatch.setattr(threads, "_INTERVAL", 0.001)
    for processors, formed in ((4, False), (2, True)):
        monkeypatch.setattr(threads, "_processors", lambda n=processors: n)
        with threads.spin_when_alone():
            threading.Event().wait(0.2)
            assert ("idle OpenMP team" in names()) == formed


SPIN = """
import time
import torch
from ssmttm.threads import IdleTeam
torch.set_num_threads(2)
x = torch.ones(1 << 18)
def burnt():
    start = time.process_time()
    for _ in range(30):
        x.sum()
        time.sleep(0.02)
    return time.process_time() - start
burnt()
spinning = burnt()
team = IdleTeam()
asleep = burnt()
team.free()
print(spinning, asleep, burnt())
"""


def test_idle_team_stops_the_spinning_of_the_threads():
    """After a shared sum the second thread waits for work: spinning, or asleep while there is an idle team."""
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SPIN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spinning, asleep, again = map(float, done.stdout.split())
    assert asleep < 0.3 * min(spinning, again), done.stdout


IMPORTS = """
import sys
import ssmttm, ssmttm.threads
from ssmttm.cli import main
assert "torch" not in sys.modules, "by ssmttm"
import sample
sample.main(["a slow waltz", "--duration", "0.1", "--out", sys.argv[1]])
heavy = ("accelerate", "diffusers", "scipy.stats", "transformers", "huggingface_hub.hf_api", "torch._dynamo")
print(*(name for name in heavy if name in sys.modules))
"""


def test_sampling_imports_only_what_it_uses(tmp_path):
    words = [sys.executable, "-c", IMPORTS, str(tmp_path / "a.wav")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2:] == ["", ""] and (tmp_path / "a.wav").exists(), done.stdout
