"""A run: stages one after another, each over all its shards, with progress."""

import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.shard_task import Counts, ShardResult, ShardTask, find_result, load_result, run_task
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.launch import slurm
from ssmttm.launch.job import Executor

STAGES = "stages.json"


class Finished(Exception):
    """The requested part of the run is done. The message names it."""


@dataclass(frozen=True)
class TaskSlice:
    """The shards of a stage that one of several tasks makes: every `num_tasks`-th one from the `index`-th on."""

    stage: str
    index: int
    num_tasks: int


@dataclass
class Run:
    """One run in a work folder.

    Args:
        root: folder of the stages.
        executor: runs the shard tasks.
        until: stop after this stage; None runs all.
        task_slice: run only this slice of this stage; the stages before it must be finished.
    """

    root: Path
    executor: Executor
    until: str | None = None
    task_slice: TaskSlice | None = None
    done: list[ShardResult] = field(default_factory=list)  # of all stages so far
    _stages: list[dict[str, Any]] = field(default_factory=list)

    def run_single(self, name: str, make: Callable[[Path], Counts]) -> Path:
        """A stage of one shard that every run rebuilds, while one of several tasks takes it as it is."""
        task = ShardTask(self.root / name / "all", uuid.uuid4().hex, make)
        self._add_stage(name, [task])
        if self.task_slice is None or self.task_slice.stage == name:
            self.done.append(run_task(task))
            _remove_others([task])
            self._stop_after(name)
            return task.target
        result = load_result(task.target)
        if result is None:
            raise UserError(f"stage {name} is not finished: run it before {self.task_slice.stage}")
        self.done.append(result)
        return task.target

    def run_stage(self, name: str, tasks: Sequence[ShardTask], device: bool = False) -> list[ShardResult]:
        """Run the unfinished tasks of a stage; returns all its results, in the order of `tasks`.

        Raises:
            Finished: after the stage `until`, or after the task slice.
            UserError: this stage is not finished, and the task slice is of a later one.
        """
        self._add_stage(name, tasks)
        done = {task.target: result for task in tasks if (result := find_result(task)) is not None}
        pending = [task for task in tasks if task.target not in done]
        own = self.task_slice
        if own is not None and own.stage != name and pending:
            raise UserError(f"stage {name} lacks {len(pending)} of {len(tasks)} shards: run it before {own.stage}")
        if own is not None and own.stage == name:
            pending = [task for task in tasks[own.index :: own.num_tasks] if task.target not in done]
        for result in self._run_tasks(name, len(tasks), list(done.values()), pending, device):
            done[result.folder] = result
        if own is None:
            _remove_others(tasks)
        results = [done[task.target] for task in tasks if task.target in done]
        self.done += results
        self._stop_after(name)
        return results

    def _stop_after(self, name: str) -> None:
        own = self.task_slice
        if own is not None and own.stage == name:
            raise Finished(f"task {own.index} of {own.num_tasks} of stage {name} is done")
        if name == self.until:
            raise Finished(f"stage {name} is done: run the same command without --until to continue")

    def _run_tasks(
        self, name: str, total: int, done: list[ShardResult], pending: list[ShardTask], device: bool
    ) -> Iterator[ShardResult]:
        """Run tasks with a progress bar that shows the rate and the number of rejections."""
        if not pending:
            return
        rejected = sum(int(result.counts.get("rejected", 0)) for result in done)
        seconds, start = 0.0, time.monotonic()
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} shards [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=total, initial=total - len(pending), desc=name, bar_format=bar_format) as bar:
            label = pending[0].target.parent.name
            for result in self.executor.run(run_task, pending, label, device):
                seconds += result.counts.get("seconds", 0.0)
                rejected += int(result.counts.get("rejected", 0))
                rate = seconds / max(time.monotonic() - start, 1e-3)
                audio = f"{seconds / 3600:.2f} h, {rate:.0f}x real time, " if seconds else ""
                bar.set_postfix_str(f"{audio}{rejected} rejected", refresh=False)
                bar.update()
                yield result

    def _add_stage(self, name: str, tasks: Sequence[ShardTask]) -> None:
        """Add a stage to the file that `status` reads; of several tasks the first one writes it."""
        folder = tasks[0].target.parent.name if tasks else name
        self._stages.append({"name": name, "folder": folder, "shards": len(tasks)})
        if self.task_slice is None or self.task_slice.index == 0:
            write_text(self.root / STAGES, json.dumps(self._stages, indent=1) + "\n")


def submit_stages(
    folder: Path,
    stages: Sequence[tuple[str, bool, bool]],
    command: Sequence[str],
    num_tasks: int,
    cpus: int,
    options: Sequence[str] = (),
    device_options: Sequence[str] = (),
) -> list[Path]:
    """Write an array script for each stage to `folder` and submit them, each to start after the one before it.

    Args:
        stages: (name, has many shards, runs a model), in order.
        command: arguments of `python -m data_prep` without executor and workers.
        num_tasks: of each array.
        cpus: of each task, and workers in it.
        options: more options of sbatch, such as `partition=cpu`.
        device_options: the same for stages that run a model, such as `gpus=1`.
    """
    scripts = []
    for number, (stage, many, device) in enumerate(stages):
        n = num_tasks if many else 1
        arguments = [sys.executable, "-m", "data_prep", *command, "--workers", str(cpus), "--stage", stage, "--task"]
        log = slurm.log_pattern(folder, f"{stage}-%a.log")
        sbatch = {"job-name": f"prep-{stage}", "cpus-per-task": cpus, "output": log}
        script = folder / f"{number}-{stage}.sbatch"
        tasks = [f"{index}/{n}" for index in range(n)]
        slurm.write_script(script, arguments, tasks, sbatch, device_options if device else options)
        scripts.append(script)
    slurm.submit(scripts)
    return scripts


def _remove_others(tasks: Sequence[ShardTask]) -> None:
    """Remove temporary folders of killed workers, and shards whose tracks no longer exist."""
    targets = {task.target for task in tasks}
    for folder in {target.parent for target in targets}:
        for path in folder.glob("*"):
            if path not in targets:
                shutil.rmtree(path, ignore_errors=True)
