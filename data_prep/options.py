"""The arguments of `python -m data_prep`."""

import argparse
import os
from pathlib import Path

from data_prep.audio.decode import Limits
from data_prep.audio.quality import Filters
from data_prep.run import TaskSlice
from data_prep.sources import SOURCES
from data_prep.stages.cut import TAILS
from ssmttm.errors import UserError
from ssmttm.licences import POLICIES

ABOUT = """\
Make a store: the folder that training and evaluation read (manifest, audio, codes, caption embeddings).

examples
  python -m data_prep builtin --hours 2 --out stores/builtin
  python -m data_prep folder --root music/ --out stores/mine --licence CC-BY-4.0
  python -m data_prep jamendo --root mtg-jamendo/ --out stores/jamendo --policy open-sa --against song_describer.csv
  python -m data_prep pack --root stores/mine --out stores/mine-dac --codec descript/dac_44khz
  python -m data_prep status stores/jamendo
  python -m data_prep report stores/jamendo

A run that was stopped goes on when the same command is given again; what was finished is used as it is. Whatever cannot
be used stands in OUT/quarantine.csv with the reason.
"""

_TARS = """\
A sample is a run of files of one name up to the first dot:

KEY.flac, .mp3, .wav ...                 its sound
KEY.json                                 what is known of it: caption, licence, title, author, tags ...
KEY.txt                                  a caption
"""
_PLAIN = argparse.RawDescriptionHelpFormatter


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser("python -m data_prep", description=ABOUT, formatter_class=_PLAIN)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    later, machine, files = _later(), _machine(), _files()
    for source in SOURCES.values():
        parents = [files, later, machine]
        one = commands.add_parser(
            source.name, parents=parents, help=source.help, description=_described(source.help, source.layout),
            usage=_usage(source.name, "--root DIR --out STORE"), formatter_class=_PLAIN,
        )  # fmt: skip
        one.add_argument("--root", type=Path, required=True, metavar="DIR", help="the data set's folder, as above")
        one.add_argument("--index", type=Path, metavar="FILE", help="another table, where the data set has several")
        one.add_argument("--out", type=Path, required=True, metavar="STORE", help="the store")

    archives = commands.add_parser(
        "webdataset", parents=[files, later, machine], help="WebDataset tars, such as `export` writes",
        usage=_usage("webdataset", "--root PATH --out STORE"), description=_TARS, formatter_class=_PLAIN,
    )  # fmt: skip
    tars = "a .tar or .tar.gz file, or a folder of them"
    archives.add_argument("--root", type=Path, required=True, metavar="PATH", help=tars)
    archives.add_argument("--out", type=Path, required=True, metavar="STORE", help="the store")

    usage = _usage("builtin", "--hours H --out STORE")
    builtin = commands.add_parser(
        "builtin", parents=[later, machine], help="music composed here, CC0-1.0", usage=usage
    )  # fmt: skip
    builtin.add_argument("--hours", type=float, required=True, metavar="H", help="at least this much audio")
    builtin.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other music")
    builtin.add_argument("--out", type=Path, required=True, metavar="STORE", help="the store")

    pack = commands.add_parser(
        "pack", parents=[later, machine], help="a store that exists, encoded or captioned anew",
        usage=_usage("pack", "--root STORE [--out STORE]"),
    )  # fmt: skip
    pack.add_argument("--root", type=Path, required=True, metavar="STORE", help="a store with audio")
    pack.add_argument("--out", type=Path, metavar="STORE", help="the new store; default: --root itself gets the codes")

    status = commands.add_parser("status", help="how far a run is")
    status.add_argument("store", type=Path, metavar="STORE", help="the --out of the run")
    report = commands.add_parser("report", help="a page about a store: hours, licences, genres, refusals, examples")
    report.add_argument("store", type=Path, metavar="STORE")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; default: STORE/report.html")
    probe = commands.add_parser("probe", help="what audio files are, or why they cannot be read")
    probe.add_argument("files", type=Path, nargs="+", metavar="FILE")
    export = commands.add_parser("export", help="a store as WebDataset tars")
    export.add_argument("store", type=Path, metavar="STORE")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the tars")
    return whole


def _usage(command: str, needed: str) -> str:
    """What is needed, without a wall of options; those are listed below it."""
    return f"python -m data_prep {command} {needed} [option ...]"


def _described(help_: str, layout: str) -> str:
    return f"{help_[0].upper()}{help_[1:]}.\n\n{layout}"


def _files() -> argparse.ArgumentParser:
    """What a source of audio files can be told."""
    group = argparse.ArgumentParser(add_help=False)
    option = group.add_argument_group("licences and what is kept out").add_argument
    option("--licence", metavar="SPDX", help="of tracks for which the data set names none, such as CC-BY-4.0")
    policies = "; ".join(f"{name}: {what}" for name, what in POLICIES.items()) + " (default: %(default)s)"
    option("--policy", default="research-nc", choices=list(POLICIES), help=f"licences let in. {policies}")
    option(
        "--against", type=Path, action="append", default=[], metavar="SET",
        help="an evaluation set whose works, artists and recordings are kept out: a table of MusicCaps, Song Describer "
        "or MTG-Jamendo, a folder of audio, a store; may be given several times",
    )  # fmt: skip
    option = group.add_argument_group("segments").add_argument
    option("--segment", type=float, default=30.0, metavar="SECONDS", help="their length (default: %(default)s)")
    tails = "; ".join(f"{name}: {what}" for name, what in TAILS.items())
    option("--tail", default="keep", choices=list(TAILS), help=f"the end of a track. {tails} (default: %(default)s)")
    option("--sample-rate", type=int, metavar="HZ", help="of the stored audio; default: the codec's, else 24000")
    option = group.add_argument_group("quality").add_argument
    default = "(default: %(default)g)"
    silence, clipped = Filters.max_silence, Filters.max_clipped
    bandwidth = f"that its sound must reach; {Filters.min_bandwidth:g} refuses what was once a telephone's {default}"
    option("--max-silence", type=float, default=silence, metavar="SHARE", help=f"of a segment's time {default}")
    option("--max-clipped", type=float, default=clipped, metavar="SHARE", help=f"of its samples {default}")
    option("--min-bandwidth", type=float, default=0.0, metavar="HZ", help=bandwidth)
    option("--refuse-dual-mono", action="store_true", help="refuse stereo whose channels are the same")
    option = group.add_argument_group("limits for one file").add_argument
    hours = Limits.max_seconds / 3600
    option("--max-hours", type=float, default=hours, metavar="H", help=f"of sound {default}")
    option("--max-bytes", type=int, default=Limits.max_bytes, metavar="N", help="of its size (default: %(default)d)")
    return group


def _later() -> argparse.ArgumentParser:
    """What is done with segments, whatever they come from."""
    group = argparse.ArgumentParser(add_help=False)
    option = group.add_argument_group("voices").add_argument
    choices = ("keep", "remove", "refuse")
    voices = "keep them (default), remove them, or refuse segments with any"
    option("--vocals", default="keep", choices=choices, help=voices)
    option("--vocal-model", metavar="MODEL", help="of the separator or the detector; a name or a folder")
    option = group.add_argument_group("captions").add_argument
    option(
        "--captions", default="source", metavar="HOW",
        help="source: as given (default); tags: made from tags where none is given; else, and one more by an audio "
        "language model: its folder or hub name, such as Qwen/Qwen2-Audio-7B-Instruct",
    )  # fmt: skip
    option("--rephrase", metavar="MODULE:FUNCTION", help="your function: a list of captions -> other wordings of each")
    option = group.add_argument_group("encoders").add_argument
    option("--codec", default="tiny", help="tiny (embedded), a codec's folder or hub name, or none: audio only")
    option("--text", default="minilm", help="minilm (embedded), a T5's name or folder, or none")
    auto = "auto: on a GPU where there is one here; on Slurm, where --sbatch-device asks for one"
    option("--device", default="auto", choices=("auto", "cpu", "cuda"), help=f"where models run ({auto})")
    return group


def _machine() -> argparse.ArgumentParser:
    """Who does the work."""
    group = argparse.ArgumentParser(add_help=False)
    option = group.add_argument_group("who does the work").add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    option("--workers", type=_count, default=cores, metavar="N", help="processes, one core each (default: %(default)s)")
    executors = "processes of this machine (default), a chain of Slurm arrays, or a Ray cluster"
    option("--executor", default="processes", choices=("processes", "slurm", "ray"), help=executors)
    option("--ray-address", metavar="ADDRESS", help="of the cluster, such as auto; default: one on this machine")
    option("--tasks", type=_count, default=16, metavar="N", help="of each Slurm array (default: %(default)s)")
    option("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="for sbatch, such as partition=cpu")
    option("--sbatch-device", action="append", default=[], metavar="KEY=VALUE", help="for stages with a model, gpus=1")
    option("--until", metavar="STAGE", help="stop after this stage, such as select, and look at `status`")
    option("--stage", metavar="STAGE", help="make a share of this stage only, as one task of several")
    option("--share", type=_share, default=(0, 1), metavar="I/N", help="which share")
    return group


def share_of(arguments: argparse.Namespace) -> TaskSlice | None:
    """The part of a stage that was asked for."""
    return None if arguments.stage is None else TaskSlice(arguments.stage, *arguments.share)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    index, _, n = text.partition("/")
    if not (index.isdecimal() and n.isdecimal() and int(index) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 3/16")
    return int(index), int(n)


def checked(value: float, low: float, high: float, name: str, unit: str) -> float:
    """A number within its limits. Raises UserError."""
    if not low <= value <= high:
        raise UserError(f"{name} must be between {low:g} and {high:g}{unit}, not {value:g}")
    return value
