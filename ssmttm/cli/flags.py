"""Renamed command-line flags."""

import sys
from collections.abc import Sequence

from ssmttm.errors import UserError

RENAMED_FLAGS = {"--painter": "--second-stage", "--paint-steps": "--diffusion-steps"}


def check_renamed_flags(argv: Sequence[str] | None) -> None:
    """Raises UserError with the new name if an argument is an old flag. None: the arguments of this process."""
    for argument in sys.argv[1:] if argv is None else argv:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if flag in RENAMED_FLAGS:
            raise UserError(f"the flag {flag} was renamed: write {RENAMED_FLAGS[flag]}")
