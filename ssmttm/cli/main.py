"""The `ssmttm` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from ssmttm import __version__, threads
from ssmttm.cli import compress, evaluate, listen, slurm, sweep, web
from ssmttm.cli.flags import parse_arguments, split_overrides
from ssmttm.errors import UserError, run_cli

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ssmttm", description="Text-to-music models with state-space backbones.")
    parser.add_argument("--version", action="version", version=f"ssmttm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info", help="device, kernels, and why each is used",
        description="Print the versions, the device, the kernel of each operation, the engines of sampling, and why; "
        "the music controls that a model takes.",
    )  # fmt: skip
    info.add_argument("model", nargs="?", metavar="MODEL", help="run, checkpoint or exported folder, name, or hub id")
    info.set_defaults(run=run_info)
    _add_training(commands)
    _add_importers(commands)
    _add_deployment(commands)
    for module in (compress, evaluate, sweep, slurm, listen, web):
        module.add_commands(commands)
    arguments = parse_arguments(parser, argv)
    with threads.spin_when_alone():
        arguments.run(arguments)
    return 0


def _add_training(commands: Commands) -> None:
    """export RUN OUT, size KEY=VALUE and cache-teacher OUT KEY=VALUE."""
    export = commands.add_parser(
        "export",
        help="write the newest good checkpoint of a run as a model folder for sample.py and load_codec, or its adapter",
        epilog="example: ssmttm export runs/lm exported/my-model\n"
        "         ssmttm export runs/stage1 exported/two-stage --second-stage runs/stage2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder or a checkpoint in it")
    export.add_argument("out", type=Path, metavar="OUT", help="output folder")
    export.add_argument("--second-stage", type=Path, metavar="RUN2", help="the second stage of a two-stage model")
    export.add_argument("--merge", action="store_true", help="of a training with an adapter, write the whole model")
    export.set_defaults(run=_call("export.model_folder", "export_stages", "run_dir", "out", "second_stage", "merge"))

    size = commands.add_parser(
        "size", help="parameters and FLOPs of a config's model; the depth or width that meets a budget",
        epilog="example: ssmttm size experiment=paper_cross_simba --parameters 281M --vary n_layers",
    )  # fmt: skip
    size.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for train.py, such as experiment=tiny")
    size.add_argument("--parameters", metavar="N", help="a budget such as 72M: also print the nearest model")
    size.add_argument("--vary", default="n_layers", metavar="KEY", help="n_layers or d_model (default: %(default)s)")
    size.set_defaults(run=run_size)

    cache = commands.add_parser(
        "cache-teacher",
        help="compute a teacher's logits for all segments of a store, for distillation from the cache",
        epilog="example: ssmttm cache-teacher logits experiment=tinyttm_lm teacher=tiny_lm data.store=STORE\n"
        "         python train.py experiment=tinyttm_lm teacher=tiny_lm data.store=STORE data.fixed_crops=true "
        "losses.hidden=0 distill.cache=logits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.add_argument("words", nargs="+", metavar="OUT KEY=VALUE", help="output folder; overrides as for train.py")
    cache.add_argument("--top-k", type=int, default=32, metavar="K", help="codes kept (default: %(default)s)")
    cache.set_defaults(run=run_cache_teacher)


def _add_importers(commands: Commands) -> None:
    """import KIND SOURCE OUT and export-musicgen MODEL OUT."""
    importing = commands.add_parser(
        "import",
        help="convert another project's checkpoint to a model folder",
        epilog="example: ssmttm import musicgen facebook/musicgen-small imported/musicgen-small",
    )
    kinds = importing.add_subparsers(dest="kind", required=True, metavar="KIND")
    musicgen = kinds.add_parser("musicgen", help="transformers' MusicGen, with its codec and text encoder")
    musicgen.add_argument("source", help="a folder or a hub name such as facebook/musicgen-small")
    released = kinds.add_parser("released", help="a .ckpt of the code of arXiv 2601.14786")
    released.add_argument("source", type=Path, help="the .ckpt file")
    back = commands.add_parser("export-musicgen", help="write a model of MusicGen's architecture for transformers")
    back.add_argument("source", type=Path, metavar="MODEL", help="a run, a checkpoint or a model folder")
    for command in (released, back):
        command.add_argument("--codec", metavar="DIR", help="the model's codec, if not found by its name")
        command.add_argument("--text-encoder", metavar="DIR", help="its text encoder, if not found by its name")
    for command in (musicgen, released, back):
        command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parts = ("codec", "text_encoder")
    musicgen.set_defaults(run=_call("export.importers", "import_musicgen", "source", "out"))
    released.set_defaults(run=_call("export.importers", "import_released", "source", "out", *parts))
    back.set_defaults(run=_call("export.importers", "export_musicgen", "source", "out", *parts))


def _add_deployment(commands: Commands) -> None:
    """quantise MODEL OUT and onnx MODEL OUT."""
    int8 = commands.add_parser(
        "quantise", help="write a model with int8 weights: smaller files, faster steps on a CPU",
        epilog="example: ssmttm quantise exported/my-model exported/my-model-int8",
    )  # fmt: skip
    int8.set_defaults(run=_call("export.int8", "export_int8", "model", "out"))
    onnx = commands.add_parser(
        "onnx", help="write a model as ONNX graphs, for programs without torch",
        epilog="example: ssmttm onnx runs/tiny exported/tiny-onnx",
    )  # fmt: skip
    onnx.set_defaults(run=_call("export.onnx", "export_onnx", "model", "out"))
    for command in (int8, onnx):
        command.add_argument("model", metavar="MODEL", help="an exported folder, tiny_lm, or a hub id")
        command.add_argument("out", type=Path, metavar="OUT", help="a new folder")


def _call(module: str, function: str, *names: str) -> Callable[[argparse.Namespace], None]:
    """A command that calls a function with some of its arguments and prints the result; the import is on demand."""

    def run(arguments: argparse.Namespace) -> None:
        print(getattr(import_module(f"ssmttm.{module}"), function)(*(getattr(arguments, name) for name in names)))

    return run


def run_info(arguments: argparse.Namespace) -> None:
    """Print versions, device, kernels and the reason for each choice; of a model its card and controls."""
    import platform

    import torch

    from ssmttm.audio import torchaudio_adapter
    from ssmttm.export.card import describe_card
    from ssmttm.generation import engines
    from ssmttm.generation.loading import describe_controls_of, open_model_folder
    from ssmttm.ops import backend

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = [("ssmttm", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for name, value in [*versions, ("device", device), ("audio", torchaudio_adapter.describe())]:
        print(f"{name:15} {value}")
    print("\noperation           on     runs as         because")
    for row in backend.describe():
        print("{:19} {:6} {:15} {}".format(*row))
    print("\nengine of steps     usable because (engine=auto takes the first that can run the model)")
    for engine in engines.describe():
        print("{:19} {:6} {}".format(*engine))
    if arguments.model is not None:
        print(f"\ncard of {arguments.model}")
        for name, text in describe_card(open_model_folder(arguments.model).card):
            print(f"{name:28} {text}")
        print(f"\ncontrol of {arguments.model}: taken by, where it is not given")
        for control in describe_controls_of(arguments.model):
            print("{:19} {:32} {}".format(*control))


def run_size(arguments: argparse.Namespace) -> None:
    """Print size and cost of a model and, with a budget, of the model that meets it."""
    from ssmttm import config
    from ssmttm.models.size import fit_budget, parse_count, size_of

    composed = config.load(*arguments.words)
    model = config.model_section(composed)
    if arguments.parameters is None:
        print(size_of(model, composed.data.frames))
        return
    fit = fit_budget(model, parse_count(arguments.parameters), arguments.vary)
    print(fit)
    print(size_of({**dict(model), fit.key: fit.value}, composed.data.frames))


def run_cache_teacher(arguments: argparse.Namespace) -> None:
    """Compute and store a teacher's logits."""
    from ssmttm import config
    from ssmttm.training.tasks.distill_lm import cache_teacher

    overrides, folders = split_overrides(arguments.words)
    if len(folders) != 1:
        raise UserError(f"give one output folder, got {len(folders)}: ssmttm cache-teacher OUT KEY=VALUE ...")
    settings = config.load(*overrides)
    if settings.task != "distill":
        raise UserError(f"task={settings.task} learns from no logits: give an experiment of task=distill")
    print(cache_teacher(settings, Path(folders[0]), arguments.top_k))


def entry() -> None:
    """The console script."""
    sys.exit(run_cli(main))


if __name__ == "__main__":
    entry()
