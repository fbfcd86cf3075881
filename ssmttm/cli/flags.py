"""Command lines with options and key=value overrides in any order, and renamed flags."""

import argparse
import re
import sys
from collections.abc import Sequence

from ssmttm.errors import UserError

RENAMED_FLAGS = {"--painter": "--second-stage", "--paint-steps": "--diffusion-steps", "--tempo": "--bpm"}


def check_renamed_flags(argv: Sequence[str] | None) -> None:
    """Raises UserError with the new name if an argument is an old flag. None: the arguments of this process."""
    for argument in sys.argv[1:] if argv is None else argv:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if flag in RENAMED_FLAGS:
            raise UserError(f"the flag {flag} was renamed: write {RENAMED_FLAGS[flag]}")


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command whose positional arguments are all in `words`, where they may stand between its options."""
    check_renamed_flags(argv)
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The key=value overrides among the words of a command, and the other words."""
    overrides = [word for word in words if re.match(r"~|\+*[A-Za-z_][\w.@]*=", word)]
    return overrides, [word for word in words if word not in overrides]
