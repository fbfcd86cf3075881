"""The engine: a shard is whole or absent, whatever dies; nothing is made twice; other inputs make it anew."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data_prep.run import Finished, Run, TaskSlice
from data_prep.shard_task import DONE, ShardResult, ShardTask, do, find, stage_folder
from data_prep.status import WORK, status
from ssmttm.errors import UserError
from ssmttm.files import directory_lock
from ssmttm.launch.shard_executors import Processes
from ssmttm.launch.slurm import Slurm, submit


def write_file(text: str, folder: Path) -> dict[str, float]:
    with open(folder.parent.with_suffix(".log"), "a") as log:
        log.write(f"{text}\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "text").write_text(text)
    return {"segments": 1, "seconds": 2.0, "rejected": text.count("bad")}


def many_files(folder: Path, last: int = 99) -> dict[str, float]:
    for index in [*range(99), last]:
        (folder / f"{index}").write_text(f"{index}")
    return {}


def fail(folder: Path) -> dict[str, float]:
    (folder / "half").write_text("half")
    raise ValueError("a bug")


def die_once(marker: Path, folder: Path) -> dict[str, float]:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_file("alive", folder)


def die(folder: Path) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def meet(place: Path, index: int, folder: Path) -> dict[str, float]:
    """Tell the process and its threads, and wait for the other one."""
    place.mkdir(exist_ok=True)
    (place / f"{index}").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    deadline = time.monotonic() + 60
    while not (place / f"{1 - index}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return {}


def works(root: Path, n: int, stage: str = "cut") -> list[ShardTask]:
    return [ShardTask(root / f"{stage}-0" / f"{i:05d}", f"in{i}", partial(write_file, f"{stage} {i}")) for i in range(n)]


def made(root: Path, stage: str = "cut") -> list[str]:
    log = root / f"{stage}-0.log"
    return sorted(log.read_text().splitlines()) if log.exists() else []


def test_a_shard_is_made_once_and_verified(tmp_path):
    (work,) = works(tmp_path, 1)
    assert find(work) is None
    first = do(work)
    assert do(work) == first == find(work) and made(tmp_path) == ["cut 0"]
    assert first.counts == {"segments": 1, "seconds": 2.0, "rejected": 0} and list(first.hashes) == ["deep/text"]
    (work.target / "deep" / "text").write_text("cut short"[:3])
    assert find(work) is None
    assert do(work) == first and made(tmp_path) == ["cut 0", "cut 0"]


def test_other_inputs_or_another_version_make_it_anew(tmp_path, monkeypatch):
    (work,) = works(tmp_path, 1)
    do(work)
    changed = replace(work, inputs="others", make=partial(write_file, "changed"))
    assert find(changed) is None and do(changed).hashes != {} and find(work) is None
    assert (work.target / "deep" / "text").read_text() == "changed"
    monkeypatch.setattr("data_prep.shard_task.__version__", "99")
    assert find(changed) is None


def test_what_a_run_keeps_of_a_shard_does_not_grow_with_its_files(tmp_path):
    done = do(ShardTask(tmp_path / "cut-0" / "00000", "x", many_files))
    assert len(pickle.dumps(done)) < 1000 and len(done.hashes) == 100
    (done.folder / "7").write_text("8")
    other = do(ShardTask(tmp_path / "cut-0" / "00001", "x", partial(many_files, last=100)))
    assert other.outputs != done.outputs and other.counts == done.counts


def test_settings_are_in_the_path(tmp_path):
    assert stage_folder(tmp_path, "cut", {"a": 1, "b": 2}) == stage_folder(tmp_path, "cut", {"b": 2, "a": 1})
    assert stage_folder(tmp_path, "cut", {"a": 1}) != stage_folder(tmp_path, "cut", {"a": 2})


def test_two_that_replace_a_shard_at_once(tmp_path, monkeypatch):
    """One finds that the other has just removed what stood there of other inputs."""
    (work,) = works(tmp_path, 1)
    do(work)
    remove = shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", lambda path, **how: [remove(path, True), remove(path, **how)])
    changed = replace(work, inputs="others")
    assert find(do(changed) and changed)


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (work,) = works(tmp_path, 1)
    seen = []
    monkeypatch.setattr("data_prep.shard_task.fsync", lambda path: seen.append((path, work.target.exists())))
    do(work)
    *inside, (parent, named) = seen
    assert (parent, named) == (work.target.parent, True) and not any(named for _, named in inside)
    aside = inside[-1][0]
    assert {path for path, _ in inside} == {aside, aside / "deep", aside / "deep" / "text", aside / DONE}


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        do(ShardTask(tmp_path / "cut-0" / "00000", "x", fail))
    assert list((tmp_path / "cut-0").iterdir()) == []


def test_a_half_made_shard_is_no_shard(tmp_path):
    (work,) = works(tmp_path, 1)
    do(work)
    (work.target / DONE).write_text((work.target / DONE).read_text()[:20])
    assert find(work) is None
    aside = work.target.with_name(".00000.abc.tmp")
    aside.mkdir()
    Run(tmp_path, Processes(1)).stage("cut", [work])
    assert not aside.exists() and find(work)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_shards_in_order_and_only_fresh_ones(tmp_path, workers):
    run = Run(tmp_path, Processes(workers))
    done = run.stage("cut", works(tmp_path, 5))
    assert [shard.folder.name for shard in done] == [f"{i:05d}" for i in range(5)]
    again = Run(tmp_path, Processes(workers))
    assert again.stage("cut", works(tmp_path, 6))[:5] == done
    assert made(tmp_path) == [f"cut {i}" for i in range(6)]
    assert [shard.folder.name for shard in again.done] == [f"{i:05d}" for i in range(6)]


def test_every_worker_has_one_thread(tmp_path, monkeypatch):
    """Also those that begin later: what a library computes must not depend on how many cores there are."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    some = [ShardTask(tmp_path / "cut-0" / f"{i}", "x", partial(meet, tmp_path / "met", i)) for i in range(2)]
    Run(tmp_path, Processes(2)).stage("cut", some)
    threads = dict((tmp_path / "met" / f"{i}").read_text().split() for i in range(2))
    assert list(threads.values()) == ["1", "1"], "two processes"
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_killed_worker_is_replaced(tmp_path):
    marked = ShardTask(tmp_path / "cut-0" / "00009", "x", partial(die_once, tmp_path / "marker"))
    done = Run(tmp_path, Processes(2)).stage("cut", [*works(tmp_path, 4), marked])
    assert len(done) == 5 and (tmp_path / "marker").exists()
    assert set(made(tmp_path)) == {"alive", *(f"cut {i}" for i in range(4))}


def test_a_shard_that_kills_every_worker_ends_the_run_in_one_line(tmp_path):
    deadly = ShardTask(tmp_path / "cut-0" / "00009", "x", die)
    with pytest.raises(UserError, match=r"a worker was killed 4 times while cut-0 .*fewer --workers"):
        Run(tmp_path, Processes(2)).stage("cut", [*works(tmp_path, 3), deadly])
    assert len(made(tmp_path)) >= 3
    assert all(find(work) for work in works(tmp_path, 3))


def test_workers_may_be_lost_as_often_as_shards_are_finished(tmp_path, monkeypatch):
    def one_then_lost(pool: None, waiting: list[ShardTask], ahead: int) -> Iterator[ShardResult]:
        yield do(waiting[0])
        raise BrokenProcessPool

    monkeypatch.setattr("ssmttm.launch.shard_executors._in_pool", one_then_lost)
    monkeypatch.setattr(Processes, "_pool", lambda *_: None)
    monkeypatch.setattr(Processes, "_close", lambda *_, **__: None)
    assert len(Run(tmp_path, Processes(2)).stage("cut", works(tmp_path, 7))) == 7


def test_shards_of_tracks_that_are_gone_are_removed(tmp_path):
    Run(tmp_path, Processes(1)).stage("cut", works(tmp_path, 4))
    Run(tmp_path, Processes(1)).stage("cut", works(tmp_path, 2))
    assert sorted(path.name for path in (tmp_path / "cut-0").glob("0*")) == ["00000", "00001"]


def test_until_and_shares(tmp_path):
    with pytest.raises(Finished, match="stage cut is done"):
        Run(tmp_path, Processes(1), until="cut").stage("cut", works(tmp_path, 2))
    stages = ("codes", works(tmp_path, 5, "codes"))
    with pytest.raises(UserError, match="stage cut lacks 1 of 3 shards: run it before codes"):
        Run(tmp_path, Processes(1), share=TaskSlice("codes", 0, 2)).stage("cut", works(tmp_path, 3))
    others = tmp_path / "codes-0" / ".00001.other.tmp"
    others.mkdir(parents=True)
    for index in range(2):
        run = Run(tmp_path, Processes(1), share=TaskSlice("codes", index, 2))
        assert len(run.stage("cut", works(tmp_path, 2))) == 2
        with pytest.raises(Finished, match=f"share {index} of 2"):
            run.stage(*stages)
        shares = [0, 2, 4] if index == 0 else range(5)
        assert made(tmp_path, "codes") == [f"codes {i}" for i in shares]
    assert others.exists(), "another task is at work on it"


def test_a_stage_of_one_is_made_anew_but_not_by_tasks(tmp_path):
    make = partial(write_file, "plan")
    with pytest.raises(UserError, match="stage plan is not finished"):
        Run(tmp_path, Processes(1), share=TaskSlice("cut", 0, 2)).alone("plan", make)
    for _ in range(2):
        folder = Run(tmp_path, Processes(1)).alone("plan", make)
    assert Run(tmp_path, Processes(1), share=TaskSlice("cut", 0, 2)).alone("plan", make) == folder
    assert (tmp_path / "plan.log").read_text() == "plan\nplan\n"


def test_status_tells_stages_and_refusals(tmp_path):
    with pytest.raises(UserError, match="nothing was prepared"):
        status(tmp_path)
    root = tmp_path / WORK
    bad = ShardTask(root / "cut-0" / "00007", "x", partial(write_file, "bad bad"))
    run = Run(root, Processes(1))
    run.stage("cut", [*works(root, 3), bad])
    shutil.copytree(bad.target, root / "cut-0" / ".00009.other.tmp")
    run._note("codes", works(root, 4, "codes"))
    lines = status(tmp_path).splitlines()
    assert lines[1].split()[:5] == ["cut", "4/4", "0.00", "h", "2"] and lines[2].split()[:2] == ["codes", "0/4"]
    assert "give the same command again" in lines[-1]


def test_status_tells_days(tmp_path):
    root = tmp_path / WORK
    Run(root, Processes(1)).stage("cut", works(root, 2))
    Run(root, Processes(1))._note("cut", works(root, 5))
    for index in range(2):
        os.utime(root / "cut-0" / f"{index:05d}" / DONE, (0, 36_000 * index))
    with directory_lock(root, "test"):
        assert status(tmp_path).splitlines()[1].split()[-1] == "30:00:00"


def test_slurm_arrays_follow_each_other(tmp_path, monkeypatch):
    """A stand-in for sbatch runs every task of a script at once, and refuses one whose forerunner it does not know."""
    stages = [("plan", False, False), ("cut", True, False), ("codes", True, True)]
    slurm = Slurm(3, 2, ("partition=cpu",), ("gpus=1",))
    with pytest.raises(UserError, match="there is no sbatch here"):
        monkeypatch.setenv("PATH", "/nowhere")
        submit(slurm, tmp_path, stages, ["folder", "--out", "a b"])
    monkeypatch.undo()
    commands = tmp_path / "bin"
    commands.mkdir()
    log = tmp_path / "log"
    (commands / "sbatch").write_text(
        f"#!/bin/bash\necho \"$@\" >> {log}\ncase \"$2\" in --dep*) ;; *) set -- $1 - $2;; esac\n"
        f"n=$(wc -l < {log}); echo \"4$n;cluster\"\n"
    )
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    scripts = submit(slurm, tmp_path, stages, ["folder", "--out", "a b"])
    told = log.read_text().splitlines()
    assert told[0] == f"--parsable {scripts[0]}"
    assert told[1] == f"--parsable --dependency=afterok:41 {scripts[1]}"
    assert told[2] == f"--parsable --dependency=afterok:42 {scripts[2]}"
    plan, cut, codes = (script.read_text() for script in scripts)
    assert "--array=0-0\n" in plan and "--array=0-2\n" in cut and "--array=0-2\n" in codes
    assert "--partition=cpu" in cut and "--gpus=1" in codes and "--gpus=1" not in cut
    assert "-m data_prep folder --out 'a b' --workers 2 --stage cut --share \"$SLURM_ARRAY_TASK_ID/3\"" in cut
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from functools import partial
from ssmttm.launch.shard_executors import Processes
from data_prep.run import Run
from data_prep.shard_task import Work
from test_prep_engine import slow
if __name__ == "__main__":
    root = Path({root!r})
    Run(root, Processes(2)).stage("cut", [Work(root / "cut-0" / f"{{i:05d}}", "x", partial(slow, i)) for i in range(4)])
"""


def slow(index: int, folder: Path) -> dict[str, float]:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def test_workers_die_with_their_leader(tmp_path):
    script = tmp_path / "leader.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
    leader = subprocess.Popen([sys.executable, str(script)], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 60
    while len(pids := [int(p.read_text() or 0) for p in tmp_path.glob("cut-0/.*/pid")]) < 2 or 0 in pids:
        assert time.monotonic() < deadline and leader.poll() is None
        time.sleep(0.1)
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
              for pid in pids):  # fmt: skip
        assert time.monotonic() < deadline, "a worker outlived its leader"
        time.sleep(0.1)


def test_done_json_tells_what_a_shard_is(tmp_path):
    (work,) = works(tmp_path, 1)
    do(work)
    facts = json.loads((work.target / DONE).read_text())
    assert facts["inputs"] == "in0" and facts["took"] >= 0 and facts["version"]
    assert facts["files"]["deep/text"]["bytes"] == len("cut 0") and len(facts["files"]["deep/text"]["sha256"]) == 64
