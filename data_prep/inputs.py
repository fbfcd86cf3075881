"""Input sources: the tracks of a data set, WebDataset archives, the built-in composer, an existing store.

An input source makes the segments that the later stages process, shard by shard.
"""

import argparse
import csv
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.audio.decode import Limits
from data_prep.audio.quality import Filters
from data_prep.run import Run
from data_prep.shard_task import Counts, ShardResult, ShardTask, stage_folder
from data_prep.sources import SOURCES, folder
from data_prep.sources.archives.webdataset import find_archives, read_all_unpacked, unpack_shard
from data_prep.sources.evaluation_sets import EvaluationSet, read_evaluation_set
from data_prep.stages.cut import Cut, cut_shard
from data_prep.stages.pack import DECONTAMINATION, REJECTED_CSV
from data_prep.stages.plan import file_stamp, planned_shards, write_plan
from data_prep.stages.segments import ROWS_FILE, Segments
from data_prep.stages.select import DecontaminationSet, fingerprint_files, select_shards
from data_prep.tables import REJECTED, REJECTED_FILE, write_rows
from data_prep.track import Rejection, Track
from ssmttm import audio
from ssmttm.audio.stereo import STEREO
from ssmttm.data.store import STEREO_COLUMNS, audio_inside, manifest_schema, open_store
from ssmttm.errors import UserError
from ssmttm.files import config_hash, file_sha256

_FILES_PER_SHARD = 64  # of an evaluation set
_ROWS_PER_SHARD = 512  # of a store
Stages = tuple[tuple[str, bool], ...]  # name, has many shards


class InputSource(Protocol):
    """Where segments come from."""

    stages: Stages
    sample_rate: int  # of the segments, in Hz
    channels: int  # of the segments, 1 or 2
    seconds: float  # maximum length of a segment

    def metadata(self) -> dict[str, Any]:
        """Everything that decides the segments, for the store's config: `source`, and earlier processing."""

    def segments(self, run: Run) -> list[Segments]:
        """Make the segments."""


class TrackInput:
    """The tracks of a source: planned, cut and selected.

    Args:
        name: of the source.
        root: folder of its files.
        tracks: items of the source.
        cut: how files become segments.
        licence: of tracks that state none; None rejects them.
        policy: a key of `ssmttm.licences.POLICIES`.
        evaluation_sets: sets to exclude.
    """

    stages: Stages = (("plan", False), ("reference", True), ("cut", True), ("select", False))

    def __init__(
        self,
        name: str,
        root: Path,
        tracks: Iterable[Track | Rejection],
        cut: Cut,
        licence: str | None = None,
        policy: str = "research-nc",
        evaluation_sets: Sequence[EvaluationSet] = (),
    ) -> None:
        self.sample_rate, self.channels, self.seconds = cut.sample_rate, cut.channels, cut.segment
        self._name, self._root, self._tracks, self._cut = name, root.resolve(), tracks, cut
        self._licence, self._policy, self._evaluation_sets = licence, policy, evaluation_sets

    def metadata(self) -> dict[str, Any]:
        """Name of the source, settings of the cut, names of the excluded sets."""
        excluded = sorted(set_.name for set_ in self._evaluation_sets)
        return {"source": {"name": self._name, "cut": self._cut.settings(), "excluded_eval_sets": excluded}}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        root, tracks = self._root_and_tracks(run)
        plan = run.run_single("plan", partial(write_plan, tracks, root, self._licence, self._policy))
        shards = planned_shards(plan)
        if not shards:
            return []
        excluded = _fingerprint(run, self._evaluation_sets)
        folder = stage_folder(run.root, "cut", {"source": self._name, **self._cut.settings()})
        tasks = [
            ShardTask(folder / key, inputs, partial(cut_shard, root, plan, index, self._cut))
            for index, (key, inputs) in enumerate(shards)
        ]
        return _select(run, run.run_stage("cut", tasks), excluded, self._cut.modifications)

    def _root_and_tracks(self, run: Run) -> tuple[Path, Iterable[Track | Rejection]]:
        return self._root, self._tracks


class ArchiveInput(TrackInput):
    """The samples of WebDataset archives: `root` is an archive or a folder of them, a shard each. Raises UserError."""

    stages: Stages = (("unpack", True), *TrackInput.stages)

    def __init__(
        self, root: Path, cut: Cut, licence: str | None, policy: str, evaluation_sets: Sequence[EvaluationSet] = ()
    ) -> None:
        super().__init__("webdataset", root, (), cut, licence, policy, evaluation_sets)
        self._archives = find_archives(self._root)

    def _root_and_tracks(self, run: Run) -> tuple[Path, Iterable[Track | Rejection]]:
        folder = stage_folder(run.root, "unpack", {})
        tasks = []
        for index, archive in enumerate(self._archives):
            inputs = config_hash({"archive": [str(archive), file_stamp(archive)]})
            tasks.append(ShardTask(folder / f"{index:05d}", inputs, partial(unpack_shard, archive)))
        results = run.run_stage("unpack", tasks)
        return folder, read_all_unpacked([shard.folder for shard in results])


class BuiltinInput:
    """Music of the built-in composer: at least `hours`, of 1 or 2 channels; another `seed` gives other music."""

    stages: Stages = (("render", True), ("select", False))

    def __init__(self, hours: float, seed: int, channels: int = 1) -> None:
        from data_prep.builtin import corpus

        self._corpus, self._hours, self._seed = corpus, hours, seed
        self.sample_rate, self.channels, self.seconds = corpus.SAMPLE_RATE, channels, corpus.SEGMENT

    def metadata(self) -> dict[str, Any]:
        """Version of the composer, hours, seed and, of stereo, channels."""
        version = self._corpus.VERSION
        source = {"name": "builtin", "version": version, "hours": self._hours, "seed": self._seed}
        return {"source": source if self.channels == 1 else source | {"channels": self.channels}}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        rendered = run.run_stage("render", self._corpus.shard_tasks(run.root, self._hours, self._seed, self.channels))
        return _select(run, rendered, [], f"{self.seconds:g} s segment")


class StoreInput:
    """The segments of a store, for another codec, text encoder or captions. Raises UserError if it has no audio."""

    stages: Stages = (("copy", True),)

    def __init__(self, root: Path) -> None:
        if not ((root / "manifest.parquet").is_file() and (root / "prep.json").is_file()):
            open_store(root)
        if (root / "quarantine.csv").is_file() and not (root / REJECTED_CSV).is_file():
            raise UserError(f"{root / 'quarantine.csv'} is now named {REJECTED_CSV}: rename it")
        self._root, self._rows = root.resolve(), pq.read_table(root / "manifest.parquet")
        self._config = json.loads((root / "prep.json").read_text(encoding="utf-8"))["config"]
        files = [audio_inside(self._root, name) for name in self._rows["audio"].to_pylist()]
        invalid = next((id for id in self._rows["id"].to_pylist() if "/" in id or "\0" in id), None)
        if invalid is not None:
            raise UserError(f"{root} has a segment {invalid!r}, which is not a valid file name")
        self.sample_rate = audio.read_part(files[0], 0, 1)[1]
        self.channels = STEREO if STEREO_COLUMNS[0].name in self._rows.column_names else 1
        self.seconds = max(self._rows["duration"].to_pylist())

    def metadata(self) -> dict[str, Any]:
        """The config of the store, except for codec and text encoder."""
        return {name: self._config.get(name) for name in ("source", "vocals", "captions")}

    def segments(self, run: Run) -> list[Segments]:
        """As `InputSource.segments`."""
        folder = stage_folder(run.root, "copy", {"root": str(self._root)})
        files = [self._root / REJECTED_CSV, self._root / DECONTAMINATION]
        reports = [file_sha256(file) for file in files if file.is_file()]
        tasks, schema = [], manifest_schema(self.channels)
        for index, first in enumerate(range(0, len(self._rows), _ROWS_PER_SHARD)):
            rows = [_without_codes(row, schema) for row in self._rows.slice(first, _ROWS_PER_SHARD).to_pylist()]
            make = partial(copy_shard, pa.Table.from_pylist(rows, schema), self._root if index == 0 else None)
            inputs = config_hash({"rows": rows, "reports": reports if index == 0 else []})
            tasks.append(ShardTask(folder / f"{index:05d}", inputs, make))
        results = run.run_stage("copy", tasks)
        return [Segments(shard.folder.name, shard.folder / ROWS_FILE, self._root, shard.outputs) for shard in results]


def copy_shard(rows: pa.Table, root: Path | None, folder: Path) -> Counts:
    """Write rows of a store; with `root` also the store's rejections and decontamination report."""
    pq.write_table(rows, folder / ROWS_FILE)
    if root is not None and (root / REJECTED_CSV).is_file():
        with open(root / REJECTED_CSV, encoding="utf-8", newline="") as file:
            write_rows(folder / REJECTED_FILE, list(csv.DictReader(file)), REJECTED)
    if root is not None and (root / DECONTAMINATION).is_file():
        shutil.copyfile(root / DECONTAMINATION, folder / DECONTAMINATION)
    return {"segments": len(rows), "seconds": sum(rows["duration"].to_pylist())}


def input_source(arguments: argparse.Namespace) -> InputSource:
    """The input source of a command line. Raises UserError for invalid values."""
    if arguments.command == "builtin":
        if not (math.isfinite(arguments.hours) and arguments.hours > 0):
            raise UserError(f"--hours must be above 0, got {arguments.hours:g}")
        return BuiltinInput(arguments.hours, arguments.seed, arguments.channels)
    root, out = arguments.root, arguments.out
    if arguments.command == "pack":
        in_place = out is None or out.resolve() == root.resolve()
        if in_place and (arguments.vocals != "keep" or arguments.captions != "source" or arguments.rephrase):
            raise UserError("--vocals, --captions and --rephrase change a store's segments: give a new store as --out")
        return StoreInput(root)
    if not (root.is_dir() or (arguments.command == "webdataset" and root.is_file())):
        raise UserError(f"no folder {root}: give the data set's folder as --root")
    if (root / "store.json").is_file():
        raise UserError(f"{root} is a store: encode or caption it again with `python -m data_prep pack --root {root}`")
    if out.resolve() == root.resolve():
        raise UserError(f"--out is the same folder as --root ({root}): give another folder for the store")
    evaluation_sets = [read_evaluation_set(path) for path in arguments.exclude_eval_sets]
    cut, licence, policy = _cut(arguments), arguments.licence, arguments.policy
    if arguments.command == "webdataset":
        return ArchiveInput(root, cut, licence, policy, evaluation_sets)
    if arguments.command == "folder":
        tracks = folder.tracks(root, arguments.index, arguments.allow_unmatched)
    else:
        tracks = SOURCES[arguments.command].tracks(root, arguments.index)
    return TrackInput(arguments.command, root, tracks, cut, licence, policy, evaluation_sets)


def _cut(arguments: argparse.Namespace) -> Cut:
    rate = arguments.sample_rate or _encoder_rate(arguments.codec, arguments.latents)
    for option, value, low, high in (
        ("--segment", arguments.segment, 1.0, 3600.0),
        ("--sample-rate", rate, 1_000, 192_000),
        ("--max-silence", arguments.max_silence, 0.0, 1.0),
        ("--max-clipped", arguments.max_clipped, 0.0, 1.0),
        ("--min-bandwidth", arguments.min_bandwidth, 0.0, 96_000.0),
        ("--max-hours", arguments.max_hours, 0.001, 1000.0),
        ("--max-bytes", arguments.max_bytes, 1, 1 << 62),
    ):
        if not low <= value <= high:
            raise UserError(f"{option} must be in [{low:g}, {high:g}], got {value:g}")
    filters = Filters(
        arguments.max_silence, arguments.max_clipped, arguments.min_bandwidth,
        dual_mono=not arguments.reject_dual_mono, out_of_phase=arguments.channels == STEREO,
    )  # fmt: skip
    limits = Limits(max_seconds=arguments.max_hours * 3600, max_bytes=arguments.max_bytes)
    return Cut(rate, arguments.segment, arguments.tail, filters, limits, arguments.channels)


def _encoder_rate(codec: str, vae: str | None) -> int:
    if vae is not None:
        from ssmttm.codecs.vae import load_vae

        return load_vae(vae).sample_rate
    if codec == "none":
        return 24_000
    from ssmttm.codecs import load_codec

    return load_codec(codec).sample_rate


def _without_codes(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    return {name: row.get(name) for name in schema.names} | {"shard": -1, "offset": 0, "frames": 0}


def _fingerprint(run: Run, evaluation_sets: Sequence[EvaluationSet]) -> list[DecontaminationSet]:
    """The stage `reference`: fingerprints of the audio of the evaluation sets."""
    folder = stage_folder(run.root, "reference", {})
    tasks: list[list[ShardTask]] = []  # by set
    for number, set_ in enumerate(evaluation_sets):
        tasks.append([])
        for index, first in enumerate(range(0, len(set_.audio), _FILES_PER_SHARD)):
            files = [file.resolve() for file in set_.audio[first : first + _FILES_PER_SHARD]]
            inputs = config_hash({"files": [[str(file), file_stamp(file)] for file in files]})
            target = folder / f"{number:02d}-{index:05d}"
            tasks[-1].append(ShardTask(target, inputs, partial(fingerprint_files, files)))
    results = iter(run.run_stage("reference", [task for own in tasks for task in own]))
    pairs = zip(evaluation_sets, tasks, strict=True)
    return [DecontaminationSet(set_, tuple(islice(results, len(own)))) for set_, own in pairs]


def _select(
    run: Run, cuts: Sequence[ShardResult], excluded: Sequence[DecontaminationSet], modifications: str
) -> list[Segments]:
    """The stage `select`, over the shards of `cut` or `render`."""
    settings = {"modifications": modifications, "excluded": [set_.evaluation_set.name for set_ in excluded]}
    inputs = config_hash({"cuts": [cut.outputs for cut in cuts], "excluded": [set_.inputs for set_ in excluded]})
    target = stage_folder(run.root, "select", settings) / "all"
    make = partial(select_shards, [cut.folder for cut in cuts], excluded, modifications)
    (result,) = run.run_stage("select", [ShardTask(target, inputs, make)])
    hashes = result.hashes
    segments = []
    for cut in cuts:
        rows = f"{cut.folder.name}/{ROWS_FILE}"
        inputs = config_hash({"rows": hashes[rows], "audio": cut.outputs})
        segments.append(Segments(cut.folder.name, target / rows, cut.folder, inputs))
    return segments
