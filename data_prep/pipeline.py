"""From an input source to a store: the stages in order; those that are not requested are skipped."""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.inputs import InputSource
from data_prep.run import Finished, Run
from data_prep.shard_task import DONE, Counts, ShardResult, ShardTask, stage_folder
from data_prep.stages.captions.stage import CaptionOptions, caption_shard
from data_prep.stages.embed import TextOptions, embed_shard
from data_prep.stages.encode import CodecOptions, Windows, encode_shard
from data_prep.stages.latents import LatentOptions, latents_shard
from data_prep.stages.pack import REJECTED_CSV, Parts, pack, write_rejected_csv
from data_prep.stages.segments import Segments, with_results
from data_prep.stages.vocals import detect_shard, remove_shard
from data_prep.status import WORK
from ssmttm.data.store import Store, open_store
from ssmttm.data.writer import CONFIG_FILE, check_same_config
from ssmttm.errors import UserError
from ssmttm.files import clear_temporary_files, config_hash, write_text

PACKED = "packed.json"
ShardFunction = Callable[..., Counts]
_MAX_WINDOW_SECONDS = 30.0  # of the codec
_BATCH_SIZES = {"cpu": Windows.batch, "cuda": 16}  # windows per batch
_LATENT_BATCH_SIZES = {"cpu": 1, "cuda": 4}  # of a VAE, which has layers at the sample rate


@dataclass(frozen=True)
class ProcessingOptions:
    """How segments are processed."""

    vocals: VocalDetection | VocalRemoval | None = None  # None keeps vocals
    captions: CaptionOptions | None = None  # None keeps those of the source
    codec: CodecOptions | None = None  # None for a store without codes
    latents: LatentOptions | None = None  # None for a store without latents of a VAE
    text: TextOptions | None = None  # None for a store without caption embeddings

    def metadata(self) -> dict[str, Any]:
        """Everything that decides segments and codes, for the store's config."""
        return {
            "vocals": self.vocals and {"how": type(self.vocals).__name__, **self.vocals.metadata()},
            "captions": self.captions and self.captions.metadata(),
            "codec": self.codec and self.codec.metadata(),
        } | ({} if self.latents is None else {"latents": self.latents.metadata()})


def stage_list(source: InputSource, options: ProcessingOptions) -> list[tuple[str, bool, bool]]:
    """The stages of a run in order: name, has many shards, runs a model."""
    first = [(name, many, False) for name, many in source.stages]
    models = {"vocals": options.vocals, "captions": options.captions, "codes": options.codec,
              "latents": options.latents, "text": options.text}  # fmt: skip
    requested = [(name, True, True) for name, option in models.items() if option is not None]
    return [*first, *requested, ("pack", False, False)]


def prepare(source: InputSource, options: ProcessingOptions, out: Path, run: Run) -> Store:
    """Make a store, or continue an interrupted run.

    Raises:
        UserError: `out` was prepared with other settings, or all tracks are rejected.
        Finished: the requested part of the run is done.
    """
    config = _config(source, options)
    _check_output(out, config, run)
    segments = source.segments(run)
    if options.vocals is not None:
        vocals = options.vocals
        make = partial(remove_shard, vocals) if isinstance(vocals, VocalRemoval) else partial(detect_shard, vocals)
        results = _run_model(run, "vocals", config["vocals"], segments, make, vocals.device)
        segments = with_results(segments, results, new_audio=isinstance(vocals, VocalRemoval))
    if options.captions is not None:
        make = partial(caption_shard, options.captions)
        results = _run_model(run, "captions", config["captions"], segments, make, options.captions.device)
        segments = with_results(segments, results, new_audio=False)
    if not any(pq.read_metadata(part.rows).num_rows for part in segments):
        raise _all_rejected(out, run)
    codec = vae = text = codes = latents = texts = None
    if options.codec is not None:
        codec = options.codec.exact_metadata()
        make = partial(encode_shard, options.codec)
        codes = _folders(_run_model(run, "codes", codec, segments, make, options.codec.device))
    if options.latents is not None:
        vae = options.latents.exact_metadata()
        make = partial(latents_shard, options.latents)
        latents = _folders(_run_model(run, "latents", vae, segments, make, options.latents.device))
    if options.text is not None:
        text = options.text.metadata()
        make = partial(embed_shard, options.text)
        texts = _folders(_run_model(run, "text", text, segments, make, options.text.device))
    if run.task_slice is not None and run.task_slice.index > 0:
        raise Finished(f"stage {run.task_slice.stage} is done by task 0")
    parts = Parts(segments, codes, latents, texts, _folders(run.done))
    shards = [result.outputs for result in run.done]
    inputs = config_hash({"config": config, "codec": codec, "text": text, "shards": shards})
    if (store := _packed_store(out, inputs)) is None:
        store = pack(parts, out, config, codec, vae, text, source.sample_rate, source.channels)
        write_text(out / WORK / PACKED, json.dumps({"inputs": inputs}) + "\n")
    return store


def report_rejections(out: Path, run: Run) -> None:
    """Write the rejections of a run that stopped before its end; a finished store keeps its own."""
    if run.task_slice is None and not (out / "store.json").is_file():
        write_rejected_csv(out / REJECTED_CSV, _folders(run.done))


def processing_options(arguments: argparse.Namespace, source: InputSource) -> ProcessingOptions:
    """The options of a command line. Raises UserError for a device or a model that is not available."""
    device = device_of(arguments)
    windows = Windows(seconds=min(source.seconds, _MAX_WINDOW_SECONDS), batch=_BATCH_SIZES[device])
    codec = None if arguments.codec == "none" else CodecOptions(arguments.codec, windows, device)
    options = ProcessingOptions(
        vocals=_vocals(arguments, device),
        captions=_captions(arguments, device),
        codec=codec,
        latents=_latents(arguments, codec, windows, device, source.sample_rate),
        text=None if arguments.text == "none" else TextOptions(arguments.text, device),
    )
    options.metadata()  # loads the models, so that errors come before anything is written
    if options.codec is not None:
        options.codec.check_channels(source.channels)
    if options.latents is not None:
        options.latents.check_channels(source.channels)
    return options


def device_of(arguments: argparse.Namespace) -> str:
    """cpu or cuda; `auto` is the GPU if there is one. Raises UserError if the device is not available."""
    import torch

    if arguments.device == "auto" and arguments.executor == "slurm":  # the same for each job of the chain
        return "cuda" if any("gpu" in line for line in arguments.sbatch_device) else "cpu"
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and arguments.executor == "processes" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available")
    return arguments.device


def _latents(
    arguments: argparse.Namespace, codec: CodecOptions | None, windows: Windows, device: str, sample_rate: int
) -> LatentOptions | None:
    if arguments.latents is None:
        return None
    if codec is None:
        raise UserError("--latents are stored beside codes: give a --codec too")
    own = replace(windows, batch=_LATENT_BATCH_SIZES[device])
    return LatentOptions(arguments.latents, own, device, codec, sample_rate)


def _vocals(arguments: argparse.Namespace, device: str) -> VocalDetection | VocalRemoval | None:
    if arguments.vocals == "keep":
        return None
    kind = VocalRemoval if arguments.vocals == "remove" else VocalDetection
    return kind(weights=arguments.vocal_model or kind.weights, device=device)


def _captions(arguments: argparse.Namespace, device: str) -> CaptionOptions | None:
    method, rephrase = arguments.captions, arguments.rephrase or ""
    if method == "source" and not rephrase:
        return None
    return CaptionOptions(
        templates=0 if method == "source" else CaptionOptions.templates,
        captioner="" if method in ("source", "tags") else method,
        rephrase=rephrase,
        instrumental=arguments.vocals != "keep",
        device=device,
    )


def _config(source: InputSource, options: ProcessingOptions) -> dict[str, Any]:
    """Everything that decides the store's segments and codes; the options override earlier processing of a store."""
    known, requested = source.metadata(), options.metadata()
    return known | {name: value for name, value in requested.items() if value is not None or name not in known}


def _check_output(out: Path, config: dict[str, Any], run: Run) -> None:
    """Check that `out` belongs to the same settings, and remove the temporary files of killed processes."""
    if any((out / WORK).glob("*/*/quarantine.parquet")):
        raise UserError(f"{out / WORK} is of an older version: remove it and run again")
    if run.task_slice is None and not _has_results(out):
        (out / CONFIG_FILE).unlink(missing_ok=True)  # of a command that failed early
    check_same_config(out, config)
    if run.task_slice is None:
        for folder in (out, out / "text", run.root):
            clear_temporary_files(folder)


def _has_results(out: Path) -> bool:
    """Whether there is a store, or a finished shard of a stage other than the plan."""
    is_store = any((out / name).exists() for name in ("manifest.parquet", "store.json"))
    return is_store or any((out / WORK).glob(f"*-*/*/{DONE}"))


def _run_model(
    run: Run, name: str, settings: dict[str, Any], segments: Sequence[Segments], make: ShardFunction, device: str
) -> list[ShardResult]:
    """Run a stage with a model over every shard of segments."""
    folder = stage_folder(run.root, name, settings)
    tasks = []
    for part in segments:
        tasks.append(ShardTask(folder / part.key, config_hash({"segments": part.inputs}), partial(make, part)))
    return run.run_stage(name, tasks, device=device == "cuda")


def _folders(results: Sequence[ShardResult]) -> list[Path]:
    return [result.folder for result in results]


def _packed_store(out: Path, inputs: str) -> Store | None:
    """The finished store, if it was packed from the same inputs and is intact."""
    file = out / WORK / PACKED
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["inputs"] != inputs:
        return None
    try:
        return open_store(out)
    except UserError:
        return None


def _all_rejected(out: Path, run: Run) -> UserError:
    """The error for a run without segments, with the first rejection."""
    write_rejected_csv(out / REJECTED_CSV, _folders(run.done))
    with open(out / REJECTED_CSV, encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file), None)
    example = f"; the first: {first['item']}: {first['reason']}" if first else ""
    return UserError(f"all tracks are rejected, see {out / REJECTED_CSV}{example}")
