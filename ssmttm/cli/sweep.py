"""`ssmttm sweep sweep=NAME ...`, `ssmttm sweep report DIR`, and what a Slurm task runs."""

import argparse
from pathlib import Path

from ssmttm.errors import UserError

_EPILOG = """\
examples:
  ssmttm sweep sweep=backbones_tiny store=data/builtin      every point of the grid, every seed; again: goes on
  ssmttm sweep sweep=backbones store=STORE launcher=slurm   one array task a job
  ssmttm sweep report runs/sweeps/backbones_tiny            tables and plots of what is there so far
all keys stand in configs/sweep.yaml; sweeps: {names}
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sweep` to the `ssmttm` command."""
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of trainings, resumable; `sweep report DIR` writes its tables and plots",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG.format(names="configs/sweep/*.yaml"),
    )
    sweep.add_argument("words", nargs="+", metavar="sweep=NAME [KEY=VALUE ...] | report DIR")
    sweep.set_defaults(run=lambda arguments: run(arguments.words))


def run(words: list[str]) -> None:
    """Run a sweep, report one, or work on one job of it."""
    match words:
        case ["report", folder]:
            from ssmttm.sweeps.report import write_report

            for path in write_report(Path(folder)):
                print(path)
        case ["job", folder, name]:
            run_job(Path(folder), name)
        case ["report" | "job", *_]:
            raise UserError("write `ssmttm sweep report DIR`, DIR being the folder of a sweep")
        case _:
            from ssmttm import config
            from ssmttm.sweeps.run import run_sweep

            folder = run_sweep(config.load(*words, root="sweep"))
            print(f"{folder.path}\nnext: ssmttm sweep report {folder.path}")


def run_job(path: Path, name: str) -> None:
    """What a Slurm task does."""
    from ssmttm.launch.sweep_launchers import run_one
    from ssmttm.launch.training_job import DONE
    from ssmttm.sweeps.folder import SweepFolder

    folder = SweepFolder(path)
    if run_one(folder, folder.job(name), folder.config()) != DONE:
        raise UserError(f"{name} failed: see {folder.job_folder(name) / 'log.txt'}")
