"""The command line `python -m data_prep`: a corpus on disk in, a store out."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep.audio.decode import Limits
from data_prep.audio.quality import Filters
from data_prep.run import Finished, Run, TaskSlice, submit_stages
from data_prep.sources import SOURCES
from data_prep.stages.cut import TAILS
from data_prep.status import WORK, status
from ssmttm.errors import Preempted, UserError
from ssmttm.licences import POLICIES

_ABOUT = """\
Make a store: the folder that training and evaluation read (manifest, audio, codes, caption embeddings).

examples
  python -m data_prep builtin --hours 2 --out stores/builtin
  python -m data_prep folder --root music/ --out stores/mine --licence CC-BY-4.0
  python -m data_prep jamendo --root mtg-jamendo/ --out stores/jamendo --policy open-sa \\
      --exclude-eval-sets song_describer.csv
  python -m data_prep pack --root stores/mine --out stores/mine-dac --codec descript/dac_44khz
  python -m data_prep status stores/jamendo
  python -m data_prep report stores/jamendo
  python -m data_prep verify stores/jamendo

Run the same command again to continue an interrupted run. OUT/rejected.csv lists everything that was rejected, with the
reason.
"""
_WEBDATASET = """\
A sample is the files of one name, in any order:

KEY.flac, .mp3, .wav ...                 audio
KEY.json                                 metadata: caption, licence, title, author, tags ...
KEY.txt                                  a caption
"""
_UNMATCHED = "go on without metadata that reach no audio file, whose licences are lost; by default an error"
_RAW = argparse.RawDescriptionHelpFormatter
_RENAMED = {"--against": "--exclude-eval-sets", "--refuse-dual-mono": "--reject-dual-mono", "--share": "--task"}


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run a command. Raises UserError for the user's mistakes."""
    argv = sys.argv[1:] if argv is None else argv
    for option in (word.partition("=")[0] for word in argv):
        if option in _RENAMED:
            raise UserError(f"{option} is now {_RENAMED[option]}")
    arguments = parser().parse_args(argv)
    match arguments.command:
        case "status":
            print(status(arguments.store))
        case "report":
            _report(arguments)
        case "verify":
            _verify(arguments.store)
        case "probe":
            _probe(arguments.files)
        case "export":
            _export(arguments)
        case _:
            with _preemptible():
                _prepare(arguments, argv)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = argparse.ArgumentParser("python -m data_prep", description=_ABOUT, formatter_class=_RAW)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    processing, execution = _processing_options(), _execution_options()
    shared = [_file_options(), processing, execution]

    def command(name: str, help: str, required: str = "", description: str | None = None, **options: Any) -> Any:
        """Add a command; returns the method that adds its arguments."""
        usage = f"python -m data_prep {name} {required} [option ...]" if required else None  # all options are too many
        return commands.add_parser(
            name, help=help, usage=usage, description=description, formatter_class=_RAW, **options
        ).add_argument

    for source in SOURCES.values():
        about = f"{source.help[0].upper()}{source.help[1:]}.\n\n{source.layout}"
        add = command(source.name, source.help, "--root DIR --out STORE", about, parents=shared)
        add("--root", type=Path, required=True, metavar="DIR", help="folder of the data set, as above")
        add("--index", type=Path, metavar="FILE", help="another table of the data set")
        add("--out", type=Path, required=True, metavar="STORE", help="the store")
        if source.name == "folder":
            add("--allow-unmatched", action="store_true", help=_UNMATCHED)

    about = "WebDataset archives, as `export` writes them"
    add = command("webdataset", about, "--root PATH --out STORE", _WEBDATASET, parents=shared)
    add("--root", type=Path, required=True, metavar="PATH", help="a .tar or .tar.gz file, or a folder of them")
    add("--out", type=Path, required=True, metavar="STORE", help="the store")

    about = "music of the built-in composer, CC0-1.0"
    add = command("builtin", about, "--hours H --out STORE", parents=[processing, execution])
    add("--hours", type=float, required=True, metavar="H", help="minimum hours of audio")
    add("--seed", type=int, default=0, metavar="S", help="(default: %(default)s)")
    add("--channels", type=int, default=1, choices=(1, 2), help="2: stereo, as its parts are panned (default: 1)")
    add("--out", type=Path, required=True, metavar="STORE", help="the store")

    about = "encode or caption an existing store again"
    add = command("pack", about, "--root STORE [--out STORE]", parents=[processing, execution])
    add("--root", type=Path, required=True, metavar="STORE", help="a store with audio")
    add("--out", type=Path, metavar="STORE", help="the new store; default: add the codes to --root")

    command("status", "progress of a run")("store", type=Path, metavar="STORE", help="the --out of the run")
    about = "Compare every file of a store with its recorded hash, and name the first that is missing or damaged."
    add = command("verify", "compare every file of a store with its recorded hash", description=about)
    add("store", type=Path, metavar="STORE", help="the folder of the store")
    add = command("report", "HTML report of a store: hours, licences, genres, rejections")
    add("store", type=Path, metavar="STORE")
    add("--out", type=Path, metavar="FILE", help="the page; default: STORE/report.html")
    add = command("probe", "format and length of audio files, or why they cannot be decoded")
    add("files", type=Path, nargs="+", metavar="FILE")
    add = command("export", "write a store as WebDataset archives")
    add("store", type=Path, metavar="STORE")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the archives")
    return whole


def _file_options() -> argparse.ArgumentParser:
    """Options for sources of audio files."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument_group("licences and decontamination").add_argument
    add("--licence", metavar="SPDX", help="of tracks whose source states none, such as CC-BY-4.0")
    policies = "; ".join(f"{name}: {what}" for name, what in POLICIES.items())
    add("--policy", default="research-nc", choices=list(POLICIES),
        help=f"allowed licences. {policies} (default: %(default)s)")  # fmt: skip
    add("--exclude-eval-sets", type=Path, nargs="+", action="extend", default=[], metavar="SET",
        help="evaluation sets whose works, artists and recordings are excluded: tables of MusicCaps, Song Describer or "
        "MTG-Jamendo, folders of audio, stores")  # fmt: skip
    add = options.add_argument_group("segments").add_argument
    add("--segment", type=float, default=30.0, metavar="SECONDS", help="segment length (default: %(default)s)")
    tails = "; ".join(f"{name}: {what}" for name, what in TAILS.items())
    add("--tail", default="keep", choices=list(TAILS), help=f"the end of a track. {tails} (default: %(default)s)")
    add("--channels", type=int, default=1, choices=(1, 2),
        help="of the stored audio: 1 mixes down, 2 keeps stereo and doubles mono (default: %(default)s)")  # fmt: skip
    add("--sample-rate", "--rate", type=int, metavar="HZ",
        help="of the stored audio; default: that of --latents, else of --codec, else 24000")  # fmt: skip
    add = options.add_argument_group("quality").add_argument
    add("--max-silence", type=float, default=Filters.max_silence, metavar="FRACTION",
        help="of a segment's time (default: %(default)g)")  # fmt: skip
    add("--max-clipped", type=float, default=Filters.max_clipped, metavar="FRACTION",
        help="of a segment's samples (default: %(default)g)")  # fmt: skip
    add("--min-bandwidth", type=float, default=0.0, metavar="HZ",
        help=f"{Filters.min_bandwidth:g} rejects audio once sampled at 8 kHz (default: %(default)g)")  # fmt: skip
    add("--reject-dual-mono", action="store_true", help="reject stereo with two identical channels")
    add = options.add_argument_group("limits of a file").add_argument
    hours = Limits.max_seconds / 3600
    add("--max-hours", type=float, default=hours, metavar="H", help="hours of audio (default: %(default)g)")
    add("--max-bytes", type=int, default=Limits.max_bytes, metavar="N", help="file size (default: %(default)d)")
    return options


def _processing_options() -> argparse.ArgumentParser:
    """Options for the processing of segments."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument_group("vocals").add_argument
    add("--vocals", default="keep", choices=("keep", "remove", "reject"),
        help="keep vocals (default), remove them, or reject segments with vocals")  # fmt: skip
    add("--vocal-model", metavar="MODEL", help="separator or classifier: a name or a folder")
    add = options.add_argument_group("captions").add_argument
    add("--captions", default="source", metavar="METHOD",
        help="source: those of the source (default); tags: also from tags where there is none; otherwise the folder or "
        "hub name of an audio language model that adds one, such as Qwen/Qwen2-Audio-7B-Instruct")  # fmt: skip
    add("--rephrase", metavar="MODULE:FUNCTION", help="your function: a list of captions -> paraphrases of each")
    add = options.add_argument_group("encoders").add_argument
    add("--codec", default="tiny", help="tiny (embedded), folder or hub name of a codec, or none: audio only")
    add("--latents", metavar="VAE", help="folder or hub name of an AutoencoderOobleck, whose latents are stored too")
    add("--text", default="minilm", help="minilm (embedded), name or folder of a T5, or none")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="of the models (auto: the GPU if there is one; with Slurm, if --sbatch-device requests one)")  # fmt: skip
    return options


def _execution_options() -> argparse.ArgumentParser:
    """Options for workers and clusters."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument_group("execution").add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=_count, default=cores, metavar="N", help="processes of one core each (default: %(default)s)")
    add("--executor", default="processes", choices=("processes", "slurm", "ray"),
        help="local processes (default), a chain of Slurm arrays, or a Ray cluster")  # fmt: skip
    add("--ray-address", metavar="ADDRESS", help="of the cluster, such as auto; default: one on this machine")
    add("--tasks", type=_count, default=16, metavar="N", help="per Slurm array (default: %(default)s)")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="option of sbatch, such as partition=cpu")
    add("--sbatch-device", action="append", default=[], metavar="KEY=VALUE",
        help="option of sbatch for stages with a model, such as gpus=1")  # fmt: skip
    add("--until", metavar="STAGE", help="stop after this stage, such as select")
    add("--stage", metavar="STAGE", help="run only this stage, as one of several tasks")
    add("--task", type=_task, default=(0, 1), metavar="I/N", help="index and number of tasks of --stage")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _task(text: str) -> tuple[int, int]:
    index, _, n = text.partition("/")
    if not (index.isdecimal() and n.isdecimal() and int(index) < int(n)):
        raise argparse.ArgumentTypeError(f"must be INDEX/NUMBER such as 3/16, got {text!r}")
    return int(index), int(n)


def _prepare(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.inputs import input_source
    from data_prep.pipeline import prepare, processing_options, report_rejections, stage_list
    from data_prep.stages.pack import summary
    from ssmttm.files import directory_lock
    from ssmttm.launch.local import ProcessExecutor
    from ssmttm.launch.ray import RayExecutor

    source = input_source(arguments)
    options = processing_options(arguments, source)
    out = arguments.out or arguments.root
    stages = stage_list(source, options)
    names = [name for name, _, _ in stages]
    _check_stages(arguments, names)
    if options.text is not None and arguments.until is None and arguments.stage is None:
        options.text.metadata()  # loads the encoder, so that an error comes early
    if arguments.executor == "slurm" and arguments.stage is None:
        scripts = out / WORK / "slurm"
        scripts.mkdir(parents=True, exist_ok=True)
        stages = stages[: names.index(arguments.until or "pack") + 1]
        submit_stages(
            scripts, stages, argv, arguments.tasks, arguments.workers, arguments.sbatch, arguments.sbatch_device
        )
        return
    use_ray = arguments.executor == "ray"
    task = None if arguments.stage is None else TaskSlice(arguments.stage, *arguments.task)
    lock = directory_lock(out / WORK, "data preparation") if task is None else nullcontext()  # tasks share the folder
    with (
        lock,
        RayExecutor(arguments.ray_address) if use_ray else ProcessExecutor(arguments.workers) as executor,
    ):
        run = Run(out / WORK, executor, arguments.until, task)
        try:
            print(summary(prepare(source, options, out, run)))
        except Finished as finished:
            report_rejections(out, run)
            print(finished)


def _check_stages(arguments: argparse.Namespace, names: list[str]) -> None:
    for option, name in (("--until", arguments.until), ("--stage", arguments.stage)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage; the stages are {', '.join(names)}")
    if arguments.stage is None and arguments.task != (0, 1):
        raise UserError("--task needs --stage")


@contextmanager
def _preemptible() -> Iterator[None]:
    """End the run with the exit code of a preempted job at SIGTERM and SIGUSR1. Finished shards are kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("finished shards are kept; run the same command to continue")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(arguments: argparse.Namespace) -> None:
    from data_prep.reports.report import write_report
    from ssmttm.data import open_store

    print(write_report(open_store(arguments.store), arguments.out or arguments.store / "report.html"))


def _verify(path: Path) -> None:
    from ssmttm.data import open_store

    store = open_store(path)
    store.verify()
    print(f"{path}: {len(store)} segments, no file is missing or damaged")


def _probe(files: list[Path]) -> None:
    from data_prep.audio.decode import probe
    from data_prep.track import Rejected

    rejected = 0
    for file in files:
        try:
            info = probe(file)
            length = "length unknown" if info.seconds is None else f"{info.seconds:.1f} s"
            print(f"{file}: {info.format}, {info.channels} channels, {info.sample_rate} Hz, {length}")
        except Rejected as error:
            rejected += 1
            print(f"{file}: rejected ({error.kind}): {error.reason}")
    if rejected:
        raise UserError(f"{rejected} of {len(files)} files are rejected, see above")


def _export(arguments: argparse.Namespace) -> None:
    from data_prep.sources.archives.export import export
    from ssmttm.data import open_store

    for archive in export(open_store(arguments.store), arguments.out):
        print(archive)
