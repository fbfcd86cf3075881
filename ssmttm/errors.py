"""What a command says, and the code it exits with, when something goes wrong.

0 good, 1 a bug (traceback), 2 a mistake that the user can mend, 75 pre-empted (run again), 130 interrupted.
"""

import errno
import sys
from collections.abc import Callable

USER_ERROR, PREEMPTED, INTERRUPTED = 2, 75, 130


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""


class Preempted(Exception):
    """The work was told to stop and can go on later. The message says how."""


def run_cli(main: Callable[[], int | None]) -> int:
    """Run a command's `main`: one clear line on standard error for everything but a bug, which keeps its traceback."""
    try:
        return main() or 0
    except UserError as error:
        return _say(f"error: {error}", USER_ERROR)
    except Preempted as stop:
        return _say(f"stopped: {stop}", PREEMPTED)
    except KeyboardInterrupt as stop:
        kept = str(stop) or "what was finished is kept; run the same command to go on"
        return _say(f"interrupted: {kept}", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _say(
                f"error: the disk is full ({error.filename or 'while writing'}): free some space, run again", USER_ERROR
            )
        raise


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
