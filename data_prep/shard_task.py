"""One shard of one stage: written to a temporary folder, fsynced, renamed, and never made twice.

A finished shard is a folder with `done.json`: hash of the inputs, counts, and the size and sha256 of each file. A hash
of the stage's settings is in the folder's path, so different settings never meet; other inputs rebuild the shard.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmttm import __version__
from ssmttm.files import config_hash, file_entry, publish_folder, temporary_path

DONE = "done.json"
Counts = dict[str, float]


@dataclass(frozen=True)
class ShardTask:
    """A shard to be made.

    Attributes:
        target: the shard's folder.
        inputs: a hash of everything that it is made from.
        make: writes the shard's files into an empty folder and returns counts (`tracks`, `segments`, `rejected`,
            `seconds` of audio). It must be picklable, and write the same bytes for the same inputs.
    """

    target: Path
    inputs: str
    make: Callable[[Path], Counts]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: its folder, its counts, and a hash of its files."""

    folder: Path
    counts: Counts
    outputs: str

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file, read from the shard: those of all shards would fill the memory."""
        return _hashes(json.loads((self.folder / DONE).read_text(encoding="utf-8"))["files"])


def stage_folder(root: Path, stage: str, settings: dict[str, Any]) -> Path:
    """The folder of a stage's shards: its name and a hash of its settings."""
    return root / f"{stage}-{config_hash(settings)[:12]}"


def find_result(task: ShardTask) -> ShardResult | None:
    """The finished shard, if it was made from the same inputs and all its files have their size."""
    return load_result(task.target, task.inputs)


def load_result(folder: Path, inputs: str | None = None) -> ShardResult | None:
    """A finished shard by its folder, made from these inputs, or from any."""
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        complete = all((folder / name).stat().st_size == entry["bytes"] for name, entry in done["files"].items())
        if not complete or inputs not in (None, done["inputs"]) or done["version"] != __version__:
            return None
        return ShardResult(folder, done["counts"], config_hash(_hashes(done["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_task(task: ShardTask) -> ShardResult:
    """Make a shard unless it is finished. Two processes may do so at once: one of the two equal results is kept."""
    finished = find_result(task)
    if finished is not None:
        return finished
    temporary = temporary_path(task.target)
    temporary.mkdir(parents=True)
    start = time.monotonic()
    try:
        with _one_thread():
            counts = task.make(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        entries = {file.relative_to(temporary).as_posix(): file_entry(file) for file in files}
        done = {
            "inputs": task.inputs,
            "version": __version__,
            "counts": counts,
            "took": round(time.monotonic() - start, 3),
            "files": entries,
        }
        (temporary / DONE).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        if task.target.exists() and find_result(task) is None:
            shutil.rmtree(task.target, ignore_errors=True)  # another process may do the same
        try:
            publish_folder(temporary, task.target)
        except OSError:
            if find_result(task) is None:
                raise
        return ShardResult(task.target, counts, config_hash(_hashes(entries)))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hashes(files: dict[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in files.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: bytes must not depend on how many processes share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        torch.set_num_threads(before)
