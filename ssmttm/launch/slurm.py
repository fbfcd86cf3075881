"""A run as a chain of Slurm arrays: for each stage a job, in which every task makes its share of the shards."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import write_text


@dataclass(frozen=True)
class Slurm:
    """What is asked of the scheduler.

    Args:
        tasks: of each array.
        cpus: of each task, and workers in it.
        options: more lines for sbatch, such as `partition=cpu`.
        device_options: the same, for the stages that hold a model, such as `gpus=1`.
    """

    tasks: int
    cpus: int = 1
    options: tuple[str, ...] = ()
    device_options: tuple[str, ...] = ()


def submit(slurm: Slurm, folder: Path, stages: Sequence[tuple[str, bool, bool]], command: Sequence[str]) -> list[Path]:
    """Write a script for each stage under `folder` and hand them to sbatch, each after the one before it.

    Args:
        stages: (name, made of many shards, holds a model), in order.
        command: the arguments of `python -m data_prep` that describe the run, without executor and workers.

    Raises:
        UserError: there is no sbatch here (the scripts are written all the same), or it refuses.
    """
    scripts = []
    for number, (stage, many, device) in enumerate(stages):
        tasks = slurm.tasks if many else 1
        options = {
            "job-name": f"prep-{stage}",
            "array": f"0-{tasks - 1}",
            "cpus-per-task": str(slurm.cpus),
            "output": str(folder / f"{stage}-%a.log"),
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
        lines += [f"#SBATCH --{line}" for line in (slurm.device_options if device else slurm.options)]
        work = [sys.executable, "-m", "data_prep", *command, "--workers", str(slurm.cpus), "--stage", stage]
        text = _SCRIPT.format(
            options="\n".join(lines), here=shlex.quote(os.getcwd()), command=shlex.join(work), tasks=tasks
        )
        script = folder / f"{number}-{stage}.sbatch"
        write_text(script, text)
        scripts.append(script)
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch here: run the scripts in {folder} one after the other where there is one")
    after: list[str] = []
    for script in scripts:
        done = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
        job = done.stdout.strip().split(";")[0]
        print(f"{script}: job {job}")
        after = [f"--dependency=afterok:{job}"]
    return scripts


_SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --requeue
#SBATCH --open-mode=append
cd {here}
exec {command} --share "$SLURM_ARRAY_TASK_ID/{tasks}"
"""
