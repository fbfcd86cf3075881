"""`ssmttm sweep sweep=NAME ...`, `ssmttm sweep report DIR`, and `ssmttm sweep job DIR NAME` for Slurm tasks."""

import argparse
from pathlib import Path

from ssmttm.errors import UserError

_EPILOG = """\
examples:
  ssmttm sweep sweep=backbones_tiny store=data/builtin      run every point of the grid with every seed, or resume
  ssmttm sweep sweep=backbones store=STORE launcher=slurm   one array task a job
  ssmttm sweep report runs/sweeps/backbones_tiny            tables and plots of the results so far
all keys are in ssmttm/config/commands.py, the sweeps in configs/sweep/
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sweep` to the `ssmttm` command."""
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of trainings, resumable; `sweep report DIR` writes tables and plots",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    sweep.add_argument("words", nargs="+", metavar="sweep=NAME [KEY=VALUE ...] | report DIR")
    sweep.set_defaults(run=lambda arguments: run(arguments.words))


def run(words: list[str]) -> None:
    """Run a sweep, write its report, or run one of its jobs."""
    from ssmttm.sweeps.folder import SweepFolder

    match words:
        case ["report", path]:
            from ssmttm.sweeps.report import write_report

            for file in write_report(Path(path)):
                print(file)
        case ["job", path, name]:
            from ssmttm.launch.job import DONE
            from ssmttm.sweeps.launchers import run_job

            folder = SweepFolder(Path(path))
            if run_job(folder, folder.config(), folder.job(name)) != DONE:
                raise UserError(f"{name} failed: see {folder.job_folder(name) / 'log.txt'}")
        case ["report" | "job", *_]:
            raise UserError("write `ssmttm sweep report DIR` with the folder of a sweep")
        case _:
            from ssmttm import config
            from ssmttm.sweeps.run import run_sweep

            folder = run_sweep(config.load(*words, root="sweep"))
            print(f"{folder.path}\nnext: ssmttm sweep report {folder.path}")
