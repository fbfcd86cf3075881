"""`ssmttm listen make | analyse | webmushra`."""

import argparse
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import write_text


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `listen` to the `ssmttm` command."""
    listen = commands.add_parser("listen", help="blind listening tests: the page, and the analysis of its answers")
    kinds = listen.add_subparsers(dest="kind_of_test", required=True, metavar="COMMAND")
    make = kinds.add_parser(
        "make",
        help="write a self-contained page",
        epilog="example: ssmttm listen make --systems ours=runs/eval/a/audio theirs=runs/eval/b/audio --out listening",
    )
    webmushra = kinds.add_parser("webmushra", help="write the same test for webMUSHRA 1.4")
    for command in (make, webmushra):
        command.add_argument("--systems", nargs="+", required=True, metavar="NAME=FOLDER", help="two or more")
        command.add_argument("--out", type=Path, required=True, help="output folder")
        command.add_argument("--kind", default="both", help="mos, pairs or both (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0, help="seed of the blind names")
    make.add_argument("--axes", nargs="+", default=None, metavar="AXIS", help="quality, musicality, adherence")
    make.add_argument("--prompts", type=int, default=None, help="number of prompts (default: all in common)")
    make.add_argument("--listeners", type=int, default=24, help="number of different orders (default: %(default)s)")
    make.set_defaults(run=run_make)
    webmushra.set_defaults(run=run_webmushra)
    analyse = kinds.add_parser(
        "analyse",
        help="mean ratings, intervals and Bradley-Terry strengths of saved answers",
        epilog="example: ssmttm listen analyse answers/*.json --key listening/key.json --out listening/report.md",
    )
    analyse.add_argument("answers", nargs="+", type=Path, help="answer files saved by the page, JSON or CSV")
    analyse.add_argument("--key", type=Path, required=True, help="key.json of the page")
    analyse.add_argument("--out", type=Path, default=None, help="also write the report there")
    analyse.set_defaults(run=run_analyse)


def run_make(arguments: argparse.Namespace) -> None:
    """Write the page and its key."""
    from ssmttm.listening.page import AXES, make_test

    axes = tuple(arguments.axes or AXES)
    written, notes = make_test(
        systems_of(arguments.systems), arguments.out, arguments.kind, axes, arguments.listeners, arguments.seed,
        arguments.prompts,
    )  # fmt: skip
    print("\n".join([*notes, *map(str, written)]))
    print(f"send {written[0]} to the listeners and keep {written[1]}; a link ending in ?p=3 is for listener 3")


def run_webmushra(arguments: argparse.Namespace) -> None:
    """Write the YAML file and the clips."""
    from ssmttm.listening.webmushra import export

    written, notes = export(systems_of(arguments.systems), arguments.out, arguments.kind, arguments.seed)
    print("\n".join([*notes, *map(str, written)]))


def run_analyse(arguments: argparse.Namespace) -> None:
    """Print the report, and write it with --out."""
    from ssmttm.listening.analyse import read_answers, report

    text = report(read_answers(arguments.answers, arguments.key))
    print(text)
    if arguments.out:
        write_text(arguments.out, text)
        print(arguments.out)


def systems_of(words: list[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER words. Raises UserError for another format or a repeated name."""
    systems: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--systems must be NAME=FOLDER, got {word}")
        if name in systems:
            raise UserError(f"--systems has the name {name} twice: use unique names")
        systems[name] = Path(folder)
    return systems
