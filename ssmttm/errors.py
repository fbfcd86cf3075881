"""Error messages and exit codes of the commands.

0 success, 1 a bug (traceback), 2 an error that the user can fix, 75 preempted (run again), 130 interrupted.
"""

import errno
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

USER_ERROR, PREEMPTED, INTERRUPTED = 2, 75, 130


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do."""


class Preempted(Exception):
    """A signal stopped the work; the message explains how to continue it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank; without a message, the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_sizes(**sizes: int) -> None:
    """Raises UserError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}")


def import_attribute(module: str, name: str) -> Any:
    """An attribute of a module, for the `__getattr__` of a package that imports on first use.

    Raises ImportError for an AttributeError inside the module: from `__getattr__` it would be taken for a missing name.
    """
    try:
        imported = import_module(module)
    except AttributeError as error:
        raise ImportError(f"{module} cannot be imported: {error}") from error
    return getattr(imported, name)


def run_cli(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and print one line on standard error for every failure but a bug."""
    try:
        return main() or 0
    except UserError as error:
        return _report(f"error: {error}", USER_ERROR)
    except Preempted as stop:
        return _report(f"stopped: {stop}", PREEMPTED)
    except KeyboardInterrupt as stop:
        message = str(stop) or "finished work is kept; run the same command to continue"
        return _report(f"interrupted: {message}", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            file = error.filename or "while writing"
            return _report(f"error: the disk is full ({file}): free some space and run again", USER_ERROR)
        raise


def _report(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
