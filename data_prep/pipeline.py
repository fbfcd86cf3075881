"""From an opening to a store: the stages in their order, each skipped where it is not asked for."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.audio.quality import Filters
from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.inputs import InputSource
from data_prep.run import Finished, Run
from data_prep.shard_task import DONE, Counts, ShardResult, ShardTask, stage_folder
from data_prep.stages.captions.captions import CaptionOptions
from data_prep.stages.captions.stage import caption_shard
from data_prep.stages.codes import Coder, encode_shard
from data_prep.stages.embed import Embedder, embed_shard
from data_prep.stages.pack import REJECTED_CSV, Parts, pack, write_rejected_csv
from data_prep.stages.segments import Segments, with_results
from data_prep.stages.vocals import detect_shard, remove_shard
from data_prep.status import WORK
from ssmttm.data.store import Store, open_store
from ssmttm.data.writer import CONFIG_FILE, check_same_config
from ssmttm.errors import UserError
from ssmttm.files import clear_temporary_files, config_hash, write_text

PACKED = "packed.json"
ProcessingOption = VocalDetection | VocalRemoval | CaptionOptions | Coder | Embedder


@dataclass(frozen=True)
class ProcessingOptions:
    """What is to be done with the segments.

    Attributes:
        vocals: taken out, or a reason to refuse a segment; None leaves them.
        captions: how captions are made; None leaves those that the source gives.
        coder: None for a store of audio only.
        embedder: None for a store without caption embeddings.
    """

    vocals: VocalDetection | VocalRemoval | None = None
    captions: CaptionOptions | None = None
    coder: Coder | None = None
    embedder: Embedder | None = None

    def facts(self) -> dict[str, Any]:
        """Everything that decides what the stages after the opening make."""
        return {
            "vocals": self.vocals and {"how": type(self.vocals).__name__, **self.vocals.metadata()},
            "captions": self.captions and self.captions.facts(),
            "codec": self.coder and self.coder.facts(),
        }

    @property
    def stages(self) -> tuple[tuple[str, bool, bool], ...]:
        """Name, whether of many shards, and whether it holds a model."""
        asked = {"vocals": self.vocals, "captions": self.captions, "codes": self.coder, "text": self.embedder}
        return tuple((name, True, True) for name, option in asked.items() if option is not None)


def stages_of(opening: InputSource, options: ProcessingOptions) -> list[tuple[str, bool, bool]]:
    """All stages of a run in order: name, whether of many shards, whether it holds a model."""
    first = [(name, many, False) for name, many in opening.stages]
    return [*first, *options.stages, ("pack", False, False)]


def prepare(opening: InputSource, options: ProcessingOptions, out: Path, run: Run) -> Store:
    """Make a store, or go on making it.

    Raises:
        UserError: `out` was prepared with other settings, or nothing came through.
        Finished: the part of the run that was asked for is done.
    """
    config = _config(opening, options)
    if run.task_slice is None and not _begun(out):
        (out / CONFIG_FILE).unlink(missing_ok=True)  # of a command that ended in a mistake before anything was made
    check_same_config(out, config)
    if run.task_slice is None:
        for folder in (out, out / "text", run.root):
            clear_temporary_files(folder)
    segments = opening.segments(run)
    if options.vocals is not None:
        made = _each(run, "vocals", config["vocals"], segments, _vocal_stage(options.vocals), options.vocals)
        segments = with_results(segments, made, audio=isinstance(options.vocals, VocalRemoval))
    if options.captions is not None:
        make = partial(caption_shard, options.captions)
        made = _each(run, "captions", config["captions"], segments, make, options.captions)
        segments = with_results(segments, made, audio=False)
    if not any(pq.read_metadata(part.rows).num_rows for part in segments):
        raise _nothing_usable(out, run)
    codec = text = codes = texts = None
    if options.coder is not None:
        codec = options.coder.exact_facts()
        codes = _folders(_each(run, "codes", codec, segments, partial(encode_shard, options.coder), options.coder))
    if options.embedder is not None:
        text = options.embedder.facts()
        texts = _folders(_each(run, "text", text, segments, partial(embed_shard, options.embedder), options.embedder))
    if run.task_slice is not None and run.task_slice.index > 0:
        raise Finished(f"the first share of stage {run.task_slice.stage} is all of it")
    parts = Parts(segments, codes, texts, _folders(run.done))
    return _packed(parts, out, config, codec, text, opening.sample_rate, [done.outputs for done in run.done])


def report_rejections(out: Path, run: Run) -> None:
    """Write what a run that stops before its end has refused so far; a finished store keeps its own."""
    if run.task_slice is None and not (out / "store.json").is_file():
        write_rejected_csv(out / REJECTED_CSV, _folders(run.done))


def _begun(out: Path) -> bool:
    """Whether there is a shard or a store, which other settings would not fit. The plan is made anew anyway."""
    made = any((out / name).exists() for name in ("manifest.parquet", "store.json"))
    return made or next((out / WORK).glob(f"*-*/*/{DONE}"), None) is not None


def _config(opening: InputSource, options: ProcessingOptions) -> dict[str, Any]:
    """Everything that decides the store's segments and codes; what is wished overrides what the opening had done."""
    known, wished = opening.facts(), options.facts()
    return known | {name: facts for name, facts in wished.items() if facts is not None or name not in known}


def _vocal_stage(how: VocalDetection | VocalRemoval) -> Callable[..., Counts]:
    if isinstance(how, VocalRemoval):
        return partial(remove_shard, how, Filters(min_bandwidth=0.0))
    return partial(detect_shard, how)


def _each(
    run: Run, name: str, settings: dict[str, Any], segments: Sequence[Segments], make: Callable[..., Counts], option: ProcessingOption
) -> list[ShardResult]:
    """One stage that holds a model, over every shard of segments."""
    folder = stage_folder(run.root, name, settings)
    works = [ShardTask(folder / part.key, config_hash({"segments": part.inputs}), partial(make, part)) for part in segments]
    return run.run_stage(name, works, device=option.device == "cuda")


def _folders(done: Sequence[ShardResult]) -> list[Path]:
    return [shard.folder for shard in done]


def _packed(
    parts: Parts,
    out: Path,
    config: dict[str, Any],
    codec: dict[str, Any] | None,
    text: dict[str, Any] | None,
    sample_rate: int,
    outputs: list[str],
) -> Store:
    """The store, put together unless it is there and was made of the same shards."""
    mark = config_hash({"config": config, "codec": codec, "text": text, "shards": outputs})
    file = out / WORK / PACKED
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["inputs"] == mark:
        try:
            return open_store(out)
        except UserError:  # it was moved or damaged since: it is put together again
            pass
    store = pack(parts, out, config, codec, text, sample_rate)
    write_text(file, json.dumps({"inputs": mark}) + "\n")
    return store


def _nothing_usable(out: Path, run: Run) -> UserError:
    """Why there is no segment at all, with the first refusal."""
    write_rejected_csv(out / REJECTED_CSV, _folders(run.done))
    with open(out / REJECTED_CSV, encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file), None)
    why = f": {first['item']}: {first['reason']}" if first else ""
    return UserError(f"nothing can be used, {out / REJECTED_CSV} says why{why}")
