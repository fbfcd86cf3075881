"""From arguments to what they ask for: an opening, wishes, an executor."""

import argparse
import math

from data_prep.audio.decode import Limits
from data_prep.audio.quality import Filters
from data_prep.audio.vocals import VocalDetection, VocalRemoval
from data_prep.inputs import ArchiveInput, BuiltinInput, InputSource, StoreInput, TrackInput
from data_prep.options import checked
from data_prep.pipeline import ProcessingOptions
from data_prep.sources import SOURCES
from data_prep.sources.references import read_references
from data_prep.stages.captions.captions import CaptionOptions
from data_prep.stages.codes import Coder
from data_prep.stages.cut import Cut
from data_prep.stages.embed import Embedder
from data_prep.stages.encode import Windows
from ssmttm.errors import UserError
from ssmttm.launch.local import ProcessExecutor
from ssmttm.launch.ray import RayExecutor

_LONGEST_WINDOW = 30.0  # seconds that a codec is given at a time
_BATCHES = {"cpu": Windows.batch, "cuda": 16}  # windows at a time


def input_source_of(arguments: argparse.Namespace) -> InputSource:
    """Where the segments come from. Raises UserError for values that cannot be."""
    if arguments.command == "builtin":
        if not (math.isfinite(arguments.hours) and arguments.hours > 0):
            raise UserError(f"--hours must be above 0, not {arguments.hours:g}")
        return BuiltinInput(arguments.hours, arguments.seed)
    if arguments.command == "pack":
        return _packed_anew(arguments)
    root, out = arguments.root, arguments.out
    if not (root.is_dir() or (arguments.command == "webdataset" and root.is_file())):
        raise UserError(f"there is no folder {root}: give the data set's folder as --root")
    if (root / "store.json").is_file():
        raise UserError(f"{root} is a store: `python -m data_prep pack --root {root}` encodes or captions it anew")
    if out.resolve() == root.resolve():
        raise UserError(f"--out is the same folder as --root ({root}): give the store a folder of its own")
    against = [read_references(path) for path in arguments.against]
    if arguments.command == "webdataset":
        return ArchiveInput(root, _cut(arguments), arguments.licence, arguments.policy, against)
    tracks = SOURCES[arguments.command].tracks(root, arguments.index)
    return TrackInput(arguments.command, root, tracks, _cut(arguments), arguments.licence, arguments.policy, against)


def _packed_anew(arguments: argparse.Namespace) -> StoreInput:
    in_place = arguments.out is None or arguments.out.resolve() == arguments.root.resolve()
    if in_place and (arguments.vocals != "keep" or arguments.captions != "source" or arguments.rephrase):
        raise UserError("--vocals, --captions and --rephrase change a store's segments: name a new store with --out")
    return StoreInput(arguments.root)


def options_of(arguments: argparse.Namespace, opening: InputSource) -> ProcessingOptions:
    """What is done with the segments. Raises UserError for a device or a model that is not there."""
    device = _device(arguments)
    windows = Windows(seconds=min(opening.seconds, _LONGEST_WINDOW), batch=_BATCHES[device])
    options = ProcessingOptions(
        vocals=_vocals(arguments, device),
        captions=_captions(arguments, device),
        coder=None if arguments.codec == "none" else Coder(arguments.codec, windows, device),
        embedder=None if arguments.text == "none" else Embedder(arguments.text, device),
    )
    options.facts()  # what is not there is said before anything is written
    return options


def executor_of(arguments: argparse.Namespace) -> ProcessExecutor | RayExecutor:
    """Who does the work; a context manager."""
    return RayExecutor(arguments.ray_address) if arguments.executor == "ray" else ProcessExecutor(arguments.workers)


def _cut(arguments: argparse.Namespace) -> Cut:
    checked(arguments.segment, 1.0, 3600.0, "--segment", " seconds")
    rate = arguments.sample_rate or _rate_of(arguments.codec)
    checked(rate, 1_000, 192_000, "--sample-rate", " Hz")
    filters = Filters(
        max_silence=checked(arguments.max_silence, 0.0, 1.0, "--max-silence", ""),
        max_clipped=checked(arguments.max_clipped, 0.0, 1.0, "--max-clipped", ""),
        min_bandwidth=checked(arguments.min_bandwidth, 0.0, 96_000.0, "--min-bandwidth", " Hz"),
        dual_mono=not arguments.refuse_dual_mono,
    )
    checked(arguments.max_hours, 0.001, 1000.0, "--max-hours", "")
    checked(arguments.max_bytes, 1, 1 << 62, "--max-bytes", "")
    limits = Limits(max_seconds=arguments.max_hours * 3600, max_bytes=arguments.max_bytes)
    return Cut(rate, arguments.segment, arguments.tail, filters, limits)


def _rate_of(codec: str) -> int:
    if codec == "none":
        return 24_000
    from ssmttm.codecs import load_codec

    return load_codec(codec).sample_rate


def _vocals(arguments: argparse.Namespace, device: str) -> VocalDetection | VocalRemoval | None:
    if arguments.vocals == "keep":
        return None
    kind = VocalRemoval if arguments.vocals == "remove" else VocalDetection
    return kind(weights=arguments.vocal_model or kind.weights, device=device)


def _captions(arguments: argparse.Namespace, device: str) -> CaptionOptions | None:
    """What is asked for beside the captions that the source gives; None for nothing."""
    how, rephrase = arguments.captions, arguments.rephrase or ""
    if how == "source" and not rephrase:
        return None
    return CaptionOptions(
        templates=0 if how == "source" else CaptionOptions.templates,
        captioner="" if how in ("source", "tags") else how,
        rephrase=rephrase,
        instrumental=arguments.vocals != "keep",
        device=device,
    )


def _device(arguments: argparse.Namespace) -> str:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    import torch

    if arguments.device == "auto" and arguments.executor == "slurm":  # each job of the chain decides the same
        return "cuda" if any("gpu" in line for line in arguments.sbatch_device) else "cpu"
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and arguments.executor == "processes" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out")
    return arguments.device
