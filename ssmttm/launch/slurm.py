"""Slurm array scripts: one array task for each entry of a list of arguments."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import write_text


def write_script(
    path: Path, command: Sequence[str], tasks: Sequence[str], options: Mapping[str, object], more: Sequence[str] = ()
) -> None:
    """Write an sbatch script whose task i runs `command` with the argument `tasks[i]` added.

    SIGUSR1 is passed on to the command 5 minutes before the time limit; exit code 75 (preempted) requeues the task.

    Args:
        options: of sbatch by long name; those that are None are left out. `array_limit` is the number of tasks that
            run at a time; `output` is a pattern, see `log_pattern`.
        more: further options, such as `partition=cpu` or `exclusive`.

    Raises:
        UserError: the value of an option has a line break, which no directive can hold.
    """
    given = {name: str(value) for name, value in options.items() if value is not None}
    limit = given.pop("array_limit", None)
    given = {"array": f"0-{len(tasks) - 1}" + (f"%{limit}" if limit else "")} | given
    text = _SCRIPT.format(
        options="\n".join(_directive(option) for option in [*map("=".join, given.items()), *more]),
        folder=shlex.quote(os.getcwd()),
        tasks=shlex.join(tasks),
        command=shlex.join(command),
    )
    write_text(path, text)


def log_pattern(folder: Path, name: str) -> str:
    """The value of `output` for logs in a folder; `name` may have replacement symbols such as %a, the folder has none.

    Raises UserError for a folder with a backslash, as sbatch then replaces no symbols at all.
    """
    if "\\" in str(folder):
        raise UserError(f"{folder} has a backslash, which Slurm's log files cannot have: choose another folder")
    return f"{folder}/".replace("%", "%%") + name


def submit(scripts: Sequence[Path]) -> None:
    """Submit scripts, each to start after the one before it has succeeded.

    Raises:
        UserError: sbatch is not installed or rejects a script.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch not found: submit the scripts in {scripts[0].parent} in order on a Slurm machine")
    dependency: list[str] = []
    for script in scripts:
        result = subprocess.run(["sbatch", "--parsable", *dependency, str(script)], capture_output=True, text=True)
        if result.returncode != 0:
            raise UserError(f"sbatch rejected {script}: {result.stderr.strip()}")
        job_id = result.stdout.strip().split(";")[0]
        print(f"{script}: job {job_id}")
        dependency = [f"--dependency=afterok:{job_id}"]


def _directive(option: str) -> str:
    """A line for sbatch, which splits it into words, and removes quotes, as a shell does."""
    if len(option.splitlines()) > 1:
        raise UserError(f"the option {option!r} of sbatch has a line break: choose a name without")
    name, equals, value = option.partition("=")
    return f"#SBATCH --{name}{equals}{shlex.quote(value) if value else ''}"


_SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
cd {folder}
tasks=({tasks})
{command} "${{tasks[$SLURM_ARRAY_TASK_ID]}}" &
pid=$!
trap 'kill -USR1 $pid; signalled=1' USR1
while
    signalled=
    wait $pid  # a signal interrupts it
    code=$?
    [ -n "$signalled" ]
do :; done
if [ $code -eq $((128 + $(kill -l USR1))) ]; then
    echo "error: the signal before the time limit came while the program was starting: set a longer time limit" >&2
fi
if [ $code -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit $code
"""
