"""A run: its stages one after the other, each over all shards, with progress, and what `status` reads of it."""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.shard_task import Counts, ShardResult, ShardTask, do, find, find_any
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.launch.shard_executors import Executor

STAGES = "stages.json"


class Finished(Exception):
    """The part of the run that was asked for is done. The message says so."""


@dataclass(frozen=True)
class TaskSlice:
    """One task's part of one stage: every `n`-th shard from the `index`-th on."""

    stage: str
    index: int
    n: int


@dataclass
class Run:
    """One run over a folder of work.

    Args:
        root: where the stages keep their shards.
        executor: who makes them.
        until: stop after this stage; None goes to the end.
        share: make only this part of this stage; the stages before it must be finished.
    """

    root: Path
    executor: Executor
    until: str | None = None
    share: TaskSlice | None = None
    done: list[ShardResult] = field(default_factory=list)  # of all stages so far
    _stages: list[dict[str, Any]] = field(default_factory=list)

    def alone(self, name: str, make: Callable[[Path], Counts]) -> Path:
        """A stage of one shard that is made anew by every run, and taken as it is by one task of several."""
        work = ShardTask(self.root / name / "all", uuid.uuid4().hex, make)
        self._note(name, [work])
        if self.share is None or self.share.stage == name:
            self.done.append(do(work))
            _remove_others([work])
            self._stop_after(name)
            return work.target
        found = find_any(work.target)
        if found is None:
            raise UserError(f"stage {name} is not finished: run it before {self.share.stage}")
        self.done.append(found)
        return work.target

    def stage(self, name: str, works: Sequence[ShardTask], device: bool = False) -> list[ShardResult]:
        """Make what is not finished of a stage; gives all its shards, in the order of `works`.

        Raises:
            Finished: after the stage that the run goes up to, or after the share that was asked for.
            UserError: an earlier stage is not finished and only a share of a later one was asked for.
        """
        self._note(name, works)
        done = {work.target: found for work in works if (found := find(work)) is not None}
        fresh = [work for work in works if work.target not in done]
        if self.share is not None and self.share.stage != name and fresh:
            raise UserError(f"stage {name} lacks {len(fresh)} of {len(works)} shards: run it before {self.share.stage}")
        if self.share is not None and self.share.stage == name:
            fresh = [work for work in works[self.share.index :: self.share.n] if work.target not in done]
        for finished in self._watched(name, works, list(done.values()), fresh, device):
            done[finished.folder] = finished
        if self.share is None:
            _remove_others(works)
        ordered = [done[work.target] for work in works if work.target in done]
        self.done += ordered
        self._stop_after(name)
        return ordered

    def _stop_after(self, name: str) -> None:
        if self.share is not None and self.share.stage == name:
            raise Finished(f"share {self.share.index} of {self.share.n} of stage {name} is done")
        if name == self.until:
            raise Finished(f"stage {name} is done: give the same command without --until to go on")

    def _watched(
        self, name: str, works: Sequence[ShardTask], done: list[ShardResult], fresh: list[ShardTask], device: bool
    ) -> Iterator[ShardResult]:
        """The shards as they are finished, with a bar that tells the rate and what was refused."""
        if not fresh:
            return
        rejected = sum(int(shard.counts.get("rejected", 0)) for shard in done)
        seconds, begun = 0.0, time.monotonic()
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} shards [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=len(works), initial=len(works) - len(fresh), desc=name, bar_format=shape) as bar:
            for shard in self.executor.run(fresh, device):
                seconds += shard.counts.get("seconds", 0.0)
                rejected += int(shard.counts.get("rejected", 0))
                rate = seconds / max(time.monotonic() - begun, 1e-3)
                sound = f"{seconds / 3600:.2f} h, {rate:.0f}x real time, " if seconds else ""
                bar.set_postfix_str(f"{sound}{rejected} refused", refresh=False)
                bar.update()
                yield shard

    def _note(self, name: str, works: Sequence[ShardTask]) -> None:
        """Tell `status` of the stage; of several tasks the first one does."""
        folder = works[0].target.parent.name if works else name
        self._stages.append({"name": name, "folder": folder, "shards": len(works)})
        if self.share is None or self.share.index == 0:
            write_text(self.root / STAGES, json.dumps(self._stages, indent=1) + "\n")


def _remove_others(works: Sequence[ShardTask]) -> None:
    """Remove what killed workers left half-made of a stage, and shards of tracks that are gone."""
    targets = {work.target for work in works}
    for folder in {target.parent for target in targets}:
        for path in folder.glob("*"):
            if path not in targets:
                shutil.rmtree(path, ignore_errors=True)
