"""One shard of one stage: made aside, fsynced, renamed; done once, whatever is killed on the way.

A finished shard is a folder with `done.json`: what it was made from, what came out, each file's size and sha256. A
stage's settings are in the path of its folder, so that two configs never meet; other inputs make the shard anew.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmttm import __version__
from ssmttm.data.writer import config_hash
from ssmttm.files import file_sha256, fsync

DONE = "done.json"
Counts = dict[str, float]


@dataclass(frozen=True)
class ShardTask:
    """A shard to be made.

    Attributes:
        target: the folder that it becomes.
        inputs: a hash of all that it is made from.
        make: writes the shard's files into the empty folder it is given, and counts (`tracks`, `segments`, `refused`,
            `seconds` of sound). It must be picklable, and give the same bytes for the same inputs.
    """

    target: Path
    inputs: str
    make: Callable[[Path], Counts]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: its folder, its counts, and a hash of all that it holds."""

    folder: Path
    counts: Counts
    outputs: str

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file, read from the shard: of all shards they would fill the memory."""
        return _hashes(json.loads((self.folder / DONE).read_text(encoding="utf-8"))["files"])


def stage_folder(root: Path, stage: str, settings: dict[str, Any]) -> Path:
    """Where a stage keeps its shards: its name and the hash of its settings."""
    return root / f"{stage}-{config_hash(settings)[:12]}"


def find(work: ShardTask) -> ShardResult | None:
    """The finished shard, if it is there, was made from the same inputs, and no file of it is missing or cut short."""
    return find_any(work.target, work.inputs)


def find_any(folder: Path, inputs: str | None = None) -> ShardResult | None:
    """A finished shard by its folder, made from these inputs, or from whatever it was."""
    try:
        facts = json.loads((folder / DONE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in facts["files"].items())
        if not whole or inputs not in (None, facts["inputs"]) or facts["version"] != __version__:
            return None
        return ShardResult(folder, facts["counts"], config_hash(_hashes(facts["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def do(work: ShardTask) -> ShardResult:
    """Make a shard, unless it is there. Safe to run twice at once: one of the two equal results is kept."""
    done = find(work)
    if done is not None:
        return done
    aside = work.target.with_name(f".{work.target.name}.{uuid.uuid4().hex}.tmp")
    aside.mkdir(parents=True)
    begun = time.monotonic()
    try:
        with _one_thread():
            counts = work.make(aside)
        files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
        entries = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in files.items()}
        facts = {
            "inputs": work.inputs,
            "version": __version__,
            "counts": counts,
            "took": round(time.monotonic() - begun, 3),
            "files": entries,
        }
        (aside / DONE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _fsync_all(aside)
        _publish(aside, work)
        return ShardResult(work.target, counts, config_hash(_hashes(entries)))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, work: ShardTask) -> None:
    """Rename `aside` to the target; what stands there of other inputs goes first."""
    if work.target.exists() and find(work) is None:
        shutil.rmtree(work.target, ignore_errors=True)  # another process may be at it
    try:
        aside.rename(work.target)
    except OSError:
        if find(work) is None:
            raise
    fsync(work.target.parent)


def _fsync_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        fsync(path)
    fsync(folder)


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
