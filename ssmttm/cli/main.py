"""The `ssmttm` command: what runs here, moving a trained model out of its run folder, measuring it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssmttm import __version__
from ssmttm.cli import compress as compression
from ssmttm.cli import evaluate as evaluation
from ssmttm.cli import listen as listening
from ssmttm.cli import sweep as sweeps
from ssmttm.errors import run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ssmttm", description="Text-to-music models with state-space backbones.")
    parser.add_argument("--version", action="version", version=f"ssmttm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="the device, the kernels found, which one runs and why")
    info.set_defaults(run=lambda arguments: print_info())

    export = commands.add_parser(
        "export",
        help="write the newest good checkpoint of a run as a folder that sample.py and load_codec read",
        epilog="example: ssmttm export runs/lm exported/my-model\n"
        "         ssmttm export runs/sketch exported/two-stage --second-stage runs/paint",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder or a checkpoint in it")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--second-stage", type=Path, metavar="RUN2", help="the second stage of a model of two")
    export.set_defaults(run=lambda arguments: export_run(arguments.run_dir, arguments.out, arguments.second_stage))

    size = commands.add_parser(
        "size",
        help="parameters and FLOPs of a config's model; which depth or width meets a budget",
        epilog="example: ssmttm size experiment=paper_cross_simba --parameters 281M --vary n_layers",
    )
    size.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py, such as experiment=tiny")
    size.add_argument("--parameters", metavar="N", help="a budget such as 72M: also print what comes nearest to it")
    size.add_argument("--vary", default="n_layers", metavar="KEY", help="n_layers or d_model (default: %(default)s)")
    size.set_defaults(run=run_size)

    cache = commands.add_parser(
        "cache-teacher",
        help="ask a teacher once for all segments of a store, for distillations that read the answers",
        epilog="example: ssmttm cache-teacher answers experiment=tinyttm_lm teacher=tiny_lm data.store=STORE\n"
        "         python train.py experiment=tinyttm_lm teacher=tiny_lm data.store=STORE data.fixed_crops=true "
        "losses.hidden=0 distill.cache=answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    cache.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py")
    cache.add_argument("--top-k", type=int, default=32, metavar="K", help="codes kept (default: %(default)s)")
    cache.set_defaults(run=run_cache_teacher)

    add_importers(commands)
    add_deployment(commands)
    compression.add_commands(commands)
    evaluation.add_commands(commands)
    sweeps.add_commands(commands)
    listening.add_commands(commands)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


def add_importers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """import KIND SOURCE OUT and export-musicgen MODEL OUT."""
    importing = commands.add_parser(
        "import",
        help="turn another project's checkpoint into a folder that sample.py reads",
        epilog="example: ssmttm import musicgen facebook/musicgen-small imported/musicgen-small",
    )
    kinds = importing.add_subparsers(dest="kind", required=True, metavar="KIND")
    musicgen = kinds.add_parser("musicgen", help="transformers' MusicGen, with its codec and text encoder")
    musicgen.add_argument("source", help="a folder or a hub name such as facebook/musicgen-small")
    released = kinds.add_parser("released", help="a .ckpt of the code of arXiv 2601.14786")
    released.add_argument("source", type=Path, help="the .ckpt file")
    back = commands.add_parser("export-musicgen", help="write a model of MusicGen's shape as transformers' MusicGen")
    back.add_argument("source", type=Path, metavar="MODEL", help="a run, a checkpoint or a model folder")
    for command in (released, back):
        command.add_argument("--codec", metavar="DIR", help="where the model's codec is, if not found by its name")
        command.add_argument("--text-encoder", metavar="DIR", help="where its text encoder is, likewise")
    for command in (musicgen, released, back):
        command.add_argument("out", type=Path, metavar="OUT", help="the folder to write, a new one")
    musicgen.set_defaults(run=run_import_musicgen)
    released.set_defaults(run=run_import_released)
    back.set_defaults(run=run_export_musicgen)


def add_deployment(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """quantise MODEL OUT and onnx MODEL OUT."""
    int8 = commands.add_parser(
        "quantise",
        help="write a model with int8 weights: smaller files, quicker steps on a CPU",
        epilog="example: ssmttm quantise exported/my-model exported/my-model-int8",
    )
    int8.set_defaults(run=run_quantise)
    onnx = commands.add_parser(
        "onnx",
        help="write a model as ONNX graphs, for programs without torch",
        epilog="example: ssmttm onnx tiny_lm exported/tiny-onnx",
    )
    onnx.set_defaults(run=run_onnx)
    for command in (int8, onnx):
        command.add_argument("model", metavar="MODEL", help="an exported folder, tiny_lm, or a hub id")
        command.add_argument("out", type=Path, metavar="OUT", help="the folder to write, a new one")


def run_quantise(arguments: argparse.Namespace) -> None:
    """Write a model with int8 weights."""
    from ssmttm.export.int8 import export_int8

    print(export_int8(arguments.model, arguments.out))


def run_onnx(arguments: argparse.Namespace) -> None:
    """Write a model as ONNX graphs."""
    from ssmttm.export.onnx import export_onnx

    print(export_onnx(arguments.model, arguments.out))


def run_import_musicgen(arguments: argparse.Namespace) -> None:
    """Write a MusicGen of transformers as a model folder."""
    from ssmttm.export.importers import import_musicgen

    print(import_musicgen(arguments.source, arguments.out))


def run_import_released(arguments: argparse.Namespace) -> None:
    """Write a checkpoint of arXiv 2601.14786's code as a model folder."""
    from ssmttm.export.importers import import_released

    print(import_released(arguments.source, arguments.out, arguments.codec, arguments.text_encoder))


def run_export_musicgen(arguments: argparse.Namespace) -> None:
    """Write a model as a MusicGen of transformers."""
    from ssmttm.export.importers import export_musicgen

    print(export_musicgen(arguments.source, arguments.out, arguments.codec, arguments.text_encoder))


def print_info() -> None:
    """Versions, device, kernels and the reason for each choice."""
    import platform

    import torch

    from ssmttm.ops import backend

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = [("ssmttm", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for name, value in [*versions, ("device", device)]:
        print(f"{name:15} {value}")
    print("\noperation         on     runs as         because")
    for row in backend.describe():
        print("{:17} {:6} {:15} {}".format(*row))


def export_run(run_dir: Path, out: Path, second_stage: Path | None = None) -> None:
    """Write the inference form of a run, or of a model of two stages."""
    from ssmttm.export.model_folder import export, export_two_stages

    print(export(run_dir, out) if second_stage is None else export_two_stages(run_dir, second_stage, out))


def run_cache_teacher(arguments: argparse.Namespace) -> None:
    """Write a teacher's answers."""
    from ssmttm import config
    from ssmttm.training.tasks.distill_lm import cache_teacher

    print(cache_teacher(config.load(*arguments.overrides), arguments.out, arguments.top_k))


def run_size(arguments: argparse.Namespace) -> None:
    """Print how large a model is and what it costs, and what meets a budget."""
    from ssmttm import config
    from ssmttm.models.size import fit_budget, parse_count, size_of

    composed = config.load(*arguments.overrides)
    if arguments.parameters is None:
        print(size_of(composed.model, composed.data.frames))
        return
    fit = fit_budget(composed.model, parse_count(arguments.parameters), arguments.vary)
    print(fit)
    print(size_of({**composed.model, fit.key: fit.value}, composed.data.frames))


def entry() -> None:
    """The console script."""
    sys.exit(run_cli(main))


if __name__ == "__main__":
    entry()
