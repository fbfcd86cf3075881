"""`ssmttm slurm OUT.sbatch experiment=NAME ...`: a Slurm script of one training."""

import argparse
import sys
from pathlib import Path

from ssmttm.errors import UserError

_EPILOG = """\
example: ssmttm slurm train.sbatch --processes 8 --gpus 8 --time 24:00:00 experiment=paper_prefix_simba data.store=STORE
         sbatch train.sbatch
Slurm sends a signal 5 minutes before the time limit. The training then writes a checkpoint and is requeued, and goes on
where it stopped. Sweeps (launcher=slurm) and `python -m data_prep ... --executor slurm` do the same.
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `slurm` to the `ssmttm` command."""
    parser = commands.add_parser(
        "slurm",
        help="write a Slurm script of a training, which is requeued at its time limit until it is done",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    parser.add_argument("words", nargs="+", metavar="OUT.sbatch KEY=VALUE", help="script; overrides as for train.py")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="on one machine (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="CPU cores (default: %(default)s)")
    parser.add_argument("--time", default="24:00:00", metavar="HH:MM:SS", help="time limit (default: %(default)s)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.set_defaults(run=write)


def write(arguments: argparse.Namespace) -> None:
    """Check the overrides and write the script."""
    from ssmttm import config
    from ssmttm.cli.flags import split_overrides
    from ssmttm.launch import slurm
    from ssmttm.launch.job import TRAIN

    overrides, names = split_overrides(arguments.words)
    if len(names) != 1:
        raise UserError("write `ssmttm slurm OUT.sbatch experiment=NAME ...` with the name of one script")
    script, settings = Path(names[0]), config.load(*overrides)
    if settings.resume != "auto":
        raise UserError(f"resume={settings.resume}: a requeued training resumes from its run_dir, leave resume out")
    command = [sys.executable, str(TRAIN)]
    if arguments.processes > 1:
        command = [sys.executable, "-m", "ssmttm.launch.ranks", str(arguments.processes), *command]
    options = {
        "job-name": Path(settings.run_dir).name,
        "nodes": 1,
        "gpus": arguments.gpus or None,
        "cpus-per-task": arguments.threads,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "output": slurm.log_pattern(script.parent.absolute(), f"{script.stem}.log"),
    }
    run_dir = config.override("run_dir", settings.run_dir)
    others = [override for override in overrides if not override.startswith("run_dir=")]
    slurm.write_script(script, [*command, *others], [run_dir], options)
    print(f"{script}\nnext: sbatch {script}")
