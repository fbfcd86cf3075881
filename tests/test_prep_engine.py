"""Shard tasks and runs: a shard is complete or absent, never made twice, and rebuilt from other inputs."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from small_shards import (
    fail,
    file_tasks,
    kill_worker,
    kill_worker_once,
    wait_for_other,
    write_file,
    write_many_files,
    written,
)  # fmt: skip

from data_prep.run import Finished, Run, TaskSlice, submit_stages
from data_prep.shard_task import DONE, ShardResult, ShardTask, find_result, run_task, stage_folder
from data_prep.status import WORK, status
from ssmttm.errors import UserError
from ssmttm.files import directory_lock
from ssmttm.launch.local import ProcessExecutor


def test_shard_is_made_once_and_verified(tmp_path):
    (task,) = file_tasks(tmp_path, 1)
    assert find_result(task) is None
    first = run_task(task)
    assert run_task(task) == first == find_result(task) and written(tmp_path) == ["cut 0"]
    assert first.counts == {"segments": 1, "seconds": 2.0, "rejected": 0} and list(first.hashes) == ["deep/text"]
    (task.target / "deep" / "text").write_text("cut short"[:3])
    assert find_result(task) is None
    assert run_task(task) == first and written(tmp_path) == ["cut 0", "cut 0"]


def test_shard_is_rebuilt_for_other_inputs_or_another_version(tmp_path, monkeypatch):
    (task,) = file_tasks(tmp_path, 1)
    run_task(task)
    changed = replace(task, inputs="others", make=partial(write_file, "changed"))
    assert find_result(changed) is None and run_task(changed).hashes != {} and find_result(task) is None
    assert (task.target / "deep" / "text").read_text() == "changed"
    monkeypatch.setattr("data_prep.shard_task.__version__", "99")
    assert find_result(changed) is None


def test_shard_result_does_not_grow_with_the_number_of_files(tmp_path):
    done = run_task(ShardTask(tmp_path / "cut-0" / "00000", "x", write_many_files))
    assert len(pickle.dumps(done)) < 1000 and len(done.hashes) == 100
    (done.folder / "7").write_text("8")
    other = run_task(ShardTask(tmp_path / "cut-0" / "00001", "x", partial(write_many_files, last=100)))
    assert other.outputs != done.outputs and other.counts == done.counts


def test_stage_folder_depends_on_the_settings(tmp_path):
    assert stage_folder(tmp_path, "cut", {"a": 1, "b": 2}) == stage_folder(tmp_path, "cut", {"b": 2, "a": 1})
    assert stage_folder(tmp_path, "cut", {"a": 1}) != stage_folder(tmp_path, "cut", {"a": 2})


def test_shard_replaced_by_two_processes_at_once(tmp_path, monkeypatch):
    """One finds that the other has just removed the old shard."""
    (task,) = file_tasks(tmp_path, 1)
    run_task(task)
    remove = shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", lambda path, **how: [remove(path, True), remove(path, **how)])
    changed = replace(task, inputs="others")
    assert find_result(run_task(changed) and changed)


def test_shard_is_fsynced_before_it_is_renamed(tmp_path, monkeypatch):
    (task,) = file_tasks(tmp_path, 1)
    calls = []
    monkeypatch.setattr("ssmttm.files.fsync", lambda path: calls.append((path, task.target.exists())))
    run_task(task)
    *inside, (parent, named) = calls
    assert (parent, named) == (task.target.parent, True) and not any(named for _, named in inside)
    temporary = inside[-1][0]
    folders = {temporary, temporary / "deep", temporary / "deep" / "text"}
    assert {path for path, _ in inside} == {*folders, temporary / DONE}


def test_shard_task_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        run_task(ShardTask(tmp_path / "cut-0" / "00000", "x", fail))
    assert list((tmp_path / "cut-0").iterdir()) == []


def test_incomplete_shard_is_rebuilt(tmp_path):
    (task,) = file_tasks(tmp_path, 1)
    run_task(task)
    (task.target / DONE).write_text((task.target / DONE).read_text()[:20])
    assert find_result(task) is None
    temporary = task.target.with_name(".00000.abc.tmp")
    temporary.mkdir()
    Run(tmp_path, ProcessExecutor(1)).run_stage("cut", [task])
    assert not temporary.exists() and find_result(task)


@pytest.mark.parametrize("workers", [1, 2])
def test_run_stage_makes_pending_shards_and_returns_all_in_order(tmp_path, workers):
    run = Run(tmp_path, ProcessExecutor(workers))
    done = run.run_stage("cut", file_tasks(tmp_path, 5))
    assert [shard.folder.name for shard in done] == [f"{i:05d}" for i in range(5)]
    again = Run(tmp_path, ProcessExecutor(workers))
    assert again.run_stage("cut", file_tasks(tmp_path, 6))[:5] == done
    assert written(tmp_path) == [f"cut {i}" for i in range(6)]
    assert [shard.folder.name for shard in again.done] == [f"{i:05d}" for i in range(6)]


def test_process_executor_gives_every_worker_one_thread(tmp_path, monkeypatch):
    """What a library computes must not depend on the number of cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    some = [ShardTask(tmp_path / "cut-0" / f"{i}", "x", partial(wait_for_other, tmp_path / "met", i)) for i in range(2)]
    Run(tmp_path, ProcessExecutor(2)).run_stage("cut", some)
    threads = dict((tmp_path / "met" / f"{i}").read_text().split() for i in range(2))
    assert list(threads.values()) == ["1", "1"], "two processes"
    assert "OMP_NUM_THREADS" not in os.environ


def test_process_executor_replaces_a_killed_worker(tmp_path):
    marked = ShardTask(tmp_path / "cut-0" / "00009", "x", partial(kill_worker_once, tmp_path / "marker"))
    done = Run(tmp_path, ProcessExecutor(2)).run_stage("cut", [*file_tasks(tmp_path, 4), marked])
    assert len(done) == 5 and (tmp_path / "marker").exists()
    assert set(written(tmp_path)) == {"alive", *(f"cut {i}" for i in range(4))}


def test_process_executor_gives_up_on_a_task_that_kills_every_worker(tmp_path):
    deadly = ShardTask(tmp_path / "cut-0" / "00009", "x", kill_worker)
    with pytest.raises(UserError, match=r"a worker was killed 4 times while cut-0 .*fewer --workers"):
        Run(tmp_path, ProcessExecutor(2)).run_stage("cut", [*file_tasks(tmp_path, 3), deadly])
    assert len(written(tmp_path)) >= 3
    assert all(find_result(task) for task in file_tasks(tmp_path, 3))


def test_process_executor_counts_losses_since_the_last_finished_task(tmp_path, monkeypatch):
    def run_one(
        pool: None, function: Callable[[ShardTask], ShardResult], items: list[ShardTask], depth: int
    ) -> Iterator[tuple[ShardTask, ShardResult]]:
        yield items[0], function(items[0])
        raise BrokenProcessPool

    monkeypatch.setattr("ssmttm.launch.local._run_unordered", run_one)
    monkeypatch.setattr(ProcessExecutor, "_pool", lambda *_: None)
    monkeypatch.setattr(ProcessExecutor, "_close", lambda *_, **__: None)
    assert len(Run(tmp_path, ProcessExecutor(2)).run_stage("cut", file_tasks(tmp_path, 7))) == 7


def test_run_stage_removes_shards_of_missing_tracks(tmp_path):
    Run(tmp_path, ProcessExecutor(1)).run_stage("cut", file_tasks(tmp_path, 4))
    Run(tmp_path, ProcessExecutor(1)).run_stage("cut", file_tasks(tmp_path, 2))
    assert sorted(path.name for path in (tmp_path / "cut-0").glob("0*")) == ["00000", "00001"]


def test_run_stops_after_until_and_runs_task_slices(tmp_path):
    with pytest.raises(Finished, match="stage cut is done"):
        Run(tmp_path, ProcessExecutor(1), until="cut").run_stage("cut", file_tasks(tmp_path, 2))
    stages = ("codes", file_tasks(tmp_path, 5, "codes"))
    with pytest.raises(UserError, match="stage cut lacks 1 of 3 shards: run it before codes"):
        Run(tmp_path, ProcessExecutor(1), task_slice=TaskSlice("codes", 0, 2)).run_stage("cut", file_tasks(tmp_path, 3))
    others = tmp_path / "codes-0" / ".00001.other.tmp"
    others.mkdir(parents=True)
    for index in range(2):
        run = Run(tmp_path, ProcessExecutor(1), task_slice=TaskSlice("codes", index, 2))
        assert len(run.run_stage("cut", file_tasks(tmp_path, 2))) == 2
        with pytest.raises(Finished, match=f"task {index} of 2"):
            run.run_stage(*stages)
        shares = [0, 2, 4] if index == 0 else range(5)
        assert written(tmp_path, "codes") == [f"codes {i}" for i in shares]
    assert others.exists(), "another task is at work on it"


def test_run_single_rebuilds_except_in_task_slices(tmp_path):
    make = partial(write_file, "plan")
    with pytest.raises(UserError, match="stage plan is not finished"):
        Run(tmp_path, ProcessExecutor(1), task_slice=TaskSlice("cut", 0, 2)).run_single("plan", make)
    for _ in range(2):
        folder = Run(tmp_path, ProcessExecutor(1)).run_single("plan", make)
    assert Run(tmp_path, ProcessExecutor(1), task_slice=TaskSlice("cut", 0, 2)).run_single("plan", make) == folder
    assert (tmp_path / "plan.log").read_text() == "plan\nplan\n"


def test_status_lists_stages_and_rejections(tmp_path):
    with pytest.raises(UserError, match="not the output of a run"):
        status(tmp_path)
    root = tmp_path / WORK
    bad = ShardTask(root / "cut-0" / "00007", "x", partial(write_file, "bad bad"))
    run = Run(root, ProcessExecutor(1))
    run.run_stage("cut", [*file_tasks(root, 3), bad])
    shutil.copytree(bad.target, root / "cut-0" / ".00009.other.tmp")
    run._add_stage("codes", file_tasks(root, 4, "codes"))
    lines = status(tmp_path).splitlines()
    assert lines[1].split()[:5] == ["cut", "4/4", "0.00", "h", "2"] and lines[2].split()[:2] == ["codes", "0/4"]
    assert "run the same command again" in lines[-1]


def test_status_shows_more_than_a_day(tmp_path):
    root = tmp_path / WORK
    Run(root, ProcessExecutor(1)).run_stage("cut", file_tasks(root, 2))
    Run(root, ProcessExecutor(1))._add_stage("cut", file_tasks(root, 5))
    for index in range(2):
        os.utime(root / "cut-0" / f"{index:05d}" / DONE, (0, 36_000 * index))
    with directory_lock(root, "test"):
        assert status(tmp_path).splitlines()[1].split()[-1] == "30:00:00"


def test_slurm_stages_depend_on_each_other(tmp_path, monkeypatch):
    """A fake sbatch logs its arguments and returns job ids."""
    stages = [("plan", False, False), ("cut", True, False), ("codes", True, True)]
    arguments = (tmp_path, stages, ["folder", "--out", "a b"], 3, 2, ["partition=cpu"], ["gpus=1"])
    with pytest.raises(UserError, match="sbatch not found"):
        monkeypatch.setenv("PATH", "/nowhere")
        submit_stages(*arguments)
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
    scripts = submit_stages(*arguments)
    calls = log.read_text().splitlines()
    assert calls[0] == f"--parsable {scripts[0]}"
    assert calls[1] == f"--parsable --dependency=afterok:41 {scripts[1]}"
    assert calls[2] == f"--parsable --dependency=afterok:42 {scripts[2]}"
    plan, cut, codes = (script.read_text() for script in scripts)
    assert "--array=0-0\n" in plan and "--array=0-2\n" in cut and "--array=0-2\n" in codes
    assert "--partition=cpu" in cut and "--gpus=1" in codes and "--gpus=1" not in cut
    assert "tasks=(0/3 1/3 2/3)\n" in cut and "tasks=(0/1)\n" in plan
    assert "-m data_prep folder --out 'a b' --workers 2 --stage cut --task \"${tasks[$SLURM_ARRAY_TASK_ID]}\"" in cut
    for script in scripts:
        assert "--signal=B:USR1@300\n" in script.read_text() and "--requeue\n" in script.read_text()
        assert subprocess.run(["bash", "-n", script]).returncode == 0


LEADER = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from functools import partial
from ssmttm.launch.local import ProcessExecutor
from data_prep.run import Run
from data_prep.shard_task import ShardTask
from small_shards import sleep_a_minute
if __name__ == "__main__":
    root = Path({root!r})
    Run(root, ProcessExecutor(2)).run_stage("cut", [
        ShardTask(root / "cut-0" / f"{{i:05d}}", "x", partial(sleep_a_minute, i)) for i in range(4)
    ])
"""


def test_process_executor_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "leader.py"
    script.write_text(LEADER.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
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


def test_done_json_contents(tmp_path):
    (task,) = file_tasks(tmp_path, 1)
    run_task(task)
    done = json.loads((task.target / DONE).read_text())
    assert done["inputs"] == "in0" and done["took"] >= 0 and done["version"]
    assert done["files"]["deep/text"]["bytes"] == len("cut 0") and len(done["files"]["deep/text"]["sha256"]) == 64
