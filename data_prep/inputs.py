"""How a run begins: with a source's tracks, with the built-in composer, or with a store that exists.

Each opening makes the segments that the later stages work on, shard by shard.
"""

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.run import Run
from data_prep.shard_task import Counts, ShardResult, ShardTask, stage_folder
from data_prep.sources.archives.webdataset import archives_of, unpack, unpacked
from data_prep.sources.references import References
from data_prep.stages.cut import Cut, cut_shard
from data_prep.stages.pack import DECONTAMINATION, REJECTED_CSV
from data_prep.stages.plan import shards_of, write_plan
from data_prep.stages.segments import ROWS_FILE, Segments
from data_prep.stages.selection import Decontamination, fingerprint_files, select_shards
from data_prep.tables import REJECTED, REJECTED_FILE, write_rows
from data_prep.track import Rejection, Track
from ssmttm import audio
from ssmttm.data.store import SCHEMA, audio_inside, open_store
from ssmttm.errors import UserError
from ssmttm.files import config_hash, file_sha256

_REFERENCE_FILES = 64  # a shard
_STORE_ROWS = 512  # a shard
_REPORTED = (REJECTED_CSV, DECONTAMINATION)


class InputSource(Protocol):
    """Where the segments come from.

    Attributes:
        stages: name of each stage, and whether it is made of many shards.
        sample_rate: Hz of the segments.
        seconds: their length.
    """

    stages: tuple[tuple[str, bool], ...]
    sample_rate: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Everything that decides the segments, for the store's config: `source`, and what was done to them since."""

    def segments(self, run: Run) -> list[Segments]:
        """Make them."""


class TrackInput:
    """A source's tracks: planned, cut, selected.

    Args:
        name: of the source.
        root: of the source's files.
        tracks: what the source yields.
        cut: how files become segments.
        licence: of tracks that name none; None refuses them.
        policy: which licences come in, a key of `ssmttm.licences.POLICIES`.
        against: evaluation sets that are kept out.
    """

    stages = (("plan", False), ("reference", True), ("cut", True), ("select", False))

    def __init__(
        self,
        name: str,
        root: Path,
        tracks: Iterable[Track | Rejection],
        cut: Cut,
        licence: str | None = None,
        policy: str = "research-nc",
        against: Sequence[References] = (),
    ) -> None:
        self.sample_rate, self.seconds = cut.sample_rate, cut.segment
        self._name, self._root, self._tracks, self._cut = name, root.resolve(), tracks, cut
        self._licence, self._policy, self._against = licence, policy, against

    def facts(self) -> dict[str, Any]:
        """The source's name, how it is cut, and what is kept out."""
        against = sorted(set_.name for set_ in self._against)
        return {"source": {"name": self._name, "cut": self._cut.settings(), "against": against}}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        root, tracks = self._found(run)
        plan = run.run_single("plan", partial(write_plan, tracks, root, self._licence, self._policy))
        if not shards_of(plan):
            return []
        against = _fingerprinted(run, self._against)
        folder = stage_folder(run.root, "cut", {"source": self._name, **self._cut.settings()})
        works = [
            ShardTask(folder / key, inputs, partial(cut_shard, root, plan, index, self._cut))
            for index, (key, inputs) in enumerate(shards_of(plan))
        ]
        return _selected(run, run.run_stage("cut", works), against, self._cut.modifications)

    def _found(self, run: Run) -> tuple[Path, Iterable[Track | Rejection]]:
        """The tracks, and the folder that their paths start from."""
        return self._root, self._tracks


class ArchiveInput(TrackInput):
    """The samples of WebDataset archives, unpacked one archive a shard; `root` is an archive or a folder of them.

    Raises:
        UserError: there is no archive.
    """

    stages = (("unpack", True), *TrackInput.stages)

    def __init__(
        self, root: Path, cut: Cut, licence: str | None, policy: str, against: Sequence[References] = ()
    ) -> None:
        super().__init__("webdataset", root, (), cut, licence, policy, against)
        self._archives = archives_of(self._root)

    def _found(self, run: Run) -> tuple[Path, Iterable[Track | Rejection]]:
        folder = stage_folder(run.root, "unpack", {})
        works = []
        for index, archive in enumerate(self._archives):
            stamp = [str(archive), archive.stat().st_size, archive.stat().st_mtime_ns]
            works.append(ShardTask(folder / f"{index:05d}", config_hash({"archive": stamp}), partial(unpack, archive)))
        done = run.run_stage("unpack", works)
        return folder, (item for shard in done for item in unpacked(shard.folder))


class BuiltinInput:
    """Music composed and rendered here.

    Args:
        hours: at least this much.
        seed: another seed, other music.
    """

    stages = (("render", True), ("select", False))

    def __init__(self, hours: float, seed: int) -> None:
        from data_prep.builtin import corpus

        self._corpus, self._hours, self._seed = corpus, hours, seed
        self.sample_rate, self.seconds = corpus.SAMPLE_RATE, corpus.SEGMENT

    def facts(self) -> dict[str, Any]:
        """Version of the composer, hours and seed."""
        version = self._corpus.VERSION
        return {"source": {"name": "builtin", "version": version, "hours": self._hours, "seed": self._seed}}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        made = run.run_stage("render", self._corpus.shard_tasks(run.root, self._hours, self._seed))
        return _selected(run, made, [], f"{self.seconds:g} s segment")


class StoreInput:
    """The segments of a store with audio, as they are: for another codec, text encoder or captions.

    Args:
        root: the store; it may be the folder that the new store is written to.

    Raises:
        UserError: there is no store, or it keeps no audio.
    """

    stages = (("take", True),)

    def __init__(self, root: Path) -> None:
        if not ((root / "manifest.parquet").is_file() and (root / "prep.json").is_file()):
            open_store(root)
        self._root, self._rows = root.resolve(), pq.read_table(root / "manifest.parquet")
        self._config = json.loads((root / "prep.json").read_text(encoding="utf-8"))["config"]
        files = [audio_inside(self._root, name) for name in self._rows["audio"].to_pylist()]
        outside = next((id for id in self._rows["id"].to_pylist() if "/" in id or "\0" in id), None)
        if outside is not None:
            raise UserError(f"{root} has a segment {outside!r}, which is no file's name: it is not to be trusted")
        self.sample_rate = audio.read_part(files[0], 0, 1)[1]
        self.seconds = max(self._rows["duration"].to_pylist())

    def facts(self) -> dict[str, Any]:
        """What the store's own segments were decided by."""
        return {name: self._config.get(name) for name in ("source", "vocals", "captions")}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        folder = stage_folder(run.root, "take", {"root": str(self._root)})
        told = [file_sha256(file) for name in _REPORTED if (file := self._root / name).is_file()]
        works = []
        for index, first in enumerate(range(0, len(self._rows), _STORE_ROWS)):
            rows = [_without_codes(row) for row in self._rows.slice(first, _STORE_ROWS).to_pylist()]
            make = partial(take_shard, pa.Table.from_pylist(rows, SCHEMA), self._root if index == 0 else None)
            inputs = config_hash({"rows": rows, "told": told if index == 0 else []})
            works.append(ShardTask(folder / f"{index:05d}", inputs, make))
        done = run.run_stage("take", works)
        return [Segments(shard.folder.name, shard.folder / ROWS_FILE, self._root, shard.outputs) for shard in done]


def take_shard(rows: pa.Table, root: Path | None, folder: Path) -> Counts:
    """Write rows of a store; with the first ones, what the store of `root` tells of refusals."""
    pq.write_table(rows, folder / ROWS_FILE)
    if root is not None and (root / REJECTED_CSV).is_file():
        with open(root / REJECTED_CSV, encoding="utf-8", newline="") as file:
            write_rows(folder / REJECTED_FILE, list(csv.DictReader(file)), REJECTED)
    if root is not None and (root / DECONTAMINATION).is_file():
        shutil.copyfile(root / DECONTAMINATION, folder / DECONTAMINATION)
    return {"segments": len(rows), "seconds": sum(rows["duration"].to_pylist())}


def _without_codes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in SCHEMA.names} | {"shard": -1, "offset": 0, "frames": 0}


def _selected(run: Run, cuts: Sequence[ShardResult], against: Sequence[Decontamination], modifications: str) -> list[Segments]:
    """The stage `select` over the first stage's shards."""
    shards = [done.folder for done in cuts]
    settings = {"modifications": modifications, "against": [set_.references.name for set_ in against]}
    inputs = config_hash({"cuts": [done.outputs for done in cuts], "against": [set_.inputs for set_ in against]})
    target = stage_folder(run.root, "select", settings) / "all"
    (done,) = run.run_stage("select", [ShardTask(target, inputs, partial(select_shards, shards, against, modifications))])
    chosen, hashes = [], done.hashes
    for cut in cuts:
        name = f"{cut.folder.name}/{ROWS_FILE}"
        inputs = config_hash({"rows": hashes[name], "sound": cut.outputs})
        chosen.append(Segments(cut.folder.name, target / name, cut.folder, inputs))
    return chosen


def _fingerprinted(run: Run, references: Sequence[References]) -> list[Decontamination]:
    """The evaluation sets with the fingerprints of their audio."""
    folder = stage_folder(run.root, "reference", {})
    works, owners = [], []
    for number, set_ in enumerate(references):
        for index, first in enumerate(range(0, len(set_.audio), _REFERENCE_FILES)):
            files = [file.resolve() for file in set_.audio[first : first + _REFERENCE_FILES]]
            stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
            make = partial(fingerprint_files, files)
            works.append(ShardTask(folder / f"{number:02d}-{index:05d}", config_hash({"files": stamps}), make))
            owners.append(set_)
    done = run.run_stage("reference", works)
    return [
        Decontamination(set_, tuple(shard for shard, owner in zip(done, owners, strict=True) if owner is set_))
        for set_ in references
    ]
