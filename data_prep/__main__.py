"""The command `python -m data_prep`: a corpus on disk in, a store out."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from data_prep.options import parser, share_of
from ssmttm.errors import Preempted, UserError, run_cli


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run a command. Raises UserError for anything the user can mend."""
    arguments = parser().parse_args(argv)
    command = {"status": _status, "report": _report, "probe": _probe, "export": _export}
    command.get(arguments.command, _prepare)(arguments, sys.argv[1:] if argv is None else argv)
    return 0


def _prepare(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.build import executor_of, input_source_of, options_of
    from data_prep.pipeline import prepare, report_rejections, stages_of
    from data_prep.run import Finished, Run, submit_stages
    from data_prep.stages.pack import summary
    from data_prep.status import WORK

    opening = input_source_of(arguments)
    options = options_of(arguments, opening)
    out = arguments.out or arguments.root
    stages = stages_of(opening, options)
    names = [name for name, _, _ in stages]
    _check_stages(arguments, names)
    if options.embedder is not None and arguments.until is None and arguments.stage is None:
        options.embedder.facts()  # an encoder that is not there is said before hours are spent
    if arguments.executor == "slurm" and arguments.stage is None:
        scripts = out / WORK / "slurm"
        scripts.mkdir(parents=True, exist_ok=True)
        stages = stages[: names.index(arguments.until or "pack") + 1]
        submit_stages(
            scripts, stages, argv, arguments.tasks, arguments.workers, arguments.sbatch, arguments.sbatch_device
        )
        return
    with _held(out / WORK, arguments), _preemptible(), executor_of(arguments) as executor:
        run = Run(out / WORK, executor, arguments.until, share_of(arguments))
        try:
            print(summary(prepare(opening, options, out, run)))
        except Finished as finished:
            report_rejections(out, run)
            print(finished)


def _check_stages(arguments: argparse.Namespace, names: list[str]) -> None:
    for option, name in (("--until", arguments.until), ("--stage", arguments.stage)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: this run has no such stage; its stages are {', '.join(names)}")
    if arguments.stage is None and arguments.share != (0, 1):
        raise UserError("--share is a share of a stage: name it with --stage")


def _held(folder: Path, arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """The folder for this process alone; the tasks of an array share it."""
    from ssmttm.files import directory_lock

    return directory_lock(folder, "data preparation") if arguments.stage is None else nullcontext()


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the run with the code that asks to be queued again; shards are whole or absent."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("what is finished is kept: give the same command again to go on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.status import status

    print(status(arguments.store))


def _report(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.reports.report import write_report
    from ssmttm.data import open_store

    print(write_report(open_store(arguments.store), arguments.out or arguments.store / "report.html"))


def _probe(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.audio.decode import probe
    from data_prep.track import Rejected

    rejected = 0
    for file in arguments.files:
        try:
            sound = probe(file)
            length = "length unknown" if sound.seconds is None else f"{sound.seconds:.1f} s"
            print(f"{file}: {sound.format}, {sound.channels} channels, {sound.sample_rate} Hz, {length}")
        except Rejected as rejection:
            rejected += 1
            print(f"{file}: refused ({rejection.kind}): {rejection.reason}")
    if rejected:
        raise UserError(f"{rejected} of {len(arguments.files)} files cannot be used, as told above")


def _export(arguments: argparse.Namespace, argv: list[str]) -> None:
    from data_prep.sources.archives.webdataset import export
    from ssmttm.data import open_store

    for tar in export(open_store(arguments.store), arguments.out):
        print(tar)


if __name__ == "__main__":
    sys.exit(run_cli(main))
