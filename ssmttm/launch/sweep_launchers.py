"""Where a sweep's jobs run: processes on this machine, a Slurm array, Ray tasks. Each works through `Work`."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from omegaconf import DictConfig
from tqdm import tqdm

from ssmttm.errors import Preempted, UserError
from ssmttm.files import write_text
from ssmttm.launch.training_job import FAILED, STOPPED, Work, failure_of, launch_command
from ssmttm.signals import INTERRUPT, stop_requests
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job

_PORT = 29_500  # of the first slot's Accelerate processes
_LOOK = 0.5  # seconds between looks at the processes


def begin(folder: SweepFolder, job: Job, settings: DictConfig, slot: int = 0, devices: str | None = None) -> Work:
    """A job's `Work` on the GPUs `devices` (as CUDA_VISIBLE_DEVICES; None: those that this process sees)."""
    launcher = settings.launcher
    environment = {"OMP_NUM_THREADS": str(launcher.threads), "TOKENIZERS_PARALLELISM": "false"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    evaluate = None if settings.sweep.evaluate is None else list(settings.sweep.evaluate)
    command = launch_command(launcher.accelerate, _PORT + slot)
    place = folder.job_folder(job.name)
    return Work(place, job, str(settings.store), evaluate, command, launcher.retries, environment)


def run_one(folder: SweepFolder, job: Job, settings: DictConfig) -> str:
    """Work on one job to its end, and give its outcome.

    Raises:
        Preempted: a signal came; the job has written its checkpoint.
    """
    work = begin(folder, job, settings)
    with stop_requests() as requested:
        while (outcome := work.poll()) is None:
            if requested():
                work.stop()
            time.sleep(_LOOK)
    if outcome == STOPPED:
        raise Preempted(f"{job.name} is kept at step {work.steps()}: run it again to go on")
    return outcome


def run_local(
    folder: SweepFolder,
    jobs: Iterable[Job],
    settings: DictConfig,
    total: int,
    finished: Callable[[Job, str], None] = lambda job, outcome: None,
) -> None:
    """Run jobs as processes on this machine, as many at once as the launcher has room for.

    Args:
        jobs: taken one by one, whenever there is a free place.
        total: how many there will be, for the progress bar.
        finished: told each job's outcome, before the next job is taken.

    Raises:
        Preempted, KeyboardInterrupt: a signal came; every job has stopped with a checkpoint.
    """
    waiting, places = iter(jobs), _places(settings.launcher)
    free = list(places)
    working: dict[int, Work] = {}
    with _stopped_on_error(working), stop_requests() as requested, tqdm(total=total, desc="sweep", unit="job") as bar:
        more = True
        while working or more:
            if requested():
                more = False
                for work in working.values():
                    work.stop()
            while free and more:
                job = next(waiting, None)
                more = job is not None
                if job is not None:
                    place = free.pop(0)
                    working[place] = begin(folder, job, settings, place, places[place])
            for place, work in list(working.items()):
                outcome = work.poll()
                if outcome is not None:
                    free.append(working.pop(place) and place)
                    finished(work.job, outcome)
                    bar.update(outcome != STOPPED)
                    if outcome == FAILED:
                        log, told = work.folder / "log.txt", failure_of(work.folder)
                        bar.write(f"{work.job.name} failed ({log}):\n{told}", file=sys.stderr)
            bar.set_postfix_str(", ".join(f"{work.job.name} at step {work.steps()}" for work in working.values()))
            time.sleep(_LOOK)
        stopped = requested()
    if stopped:
        where = f"what was trained is kept in {folder.path}: run the same command to go on"
        raise KeyboardInterrupt(where) if stopped == INTERRUPT else Preempted(where)


@contextmanager
def _stopped_on_error(working: Mapping[int, Work]) -> Iterator[None]:
    """Leave no training running whose sweep has ended with an error."""
    try:
        yield
    except BaseException:
        for work in working.values():
            work.stop()
        raise


def run_slurm(folder: SweepFolder, jobs: list[Job], settings: DictConfig) -> None:
    """Write OUT/sweep.sbatch, an array with one task a job, and hand it to sbatch.

    A task is told 5 minutes before its time is up, writes a checkpoint, and is queued again.

    Raises:
        UserError: there is no sbatch here (the script is written all the same), or it refuses.
    """
    launcher, script = settings.launcher, folder.path / "sweep.sbatch"
    options = {
        "job-name": f"sweep-{settings.sweep.name}",
        "array": f"0-{len(jobs) - 1}" + (f"%{launcher.parallel}" if launcher.parallel else ""),
        "gpus": launcher.gpus,
        "cpus-per-task": launcher.threads,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "signal": "B:USR1@300",
        "output": folder.path / "slurm-%a.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    command = shlex.join([sys.executable, "-m", "ssmttm.cli.main", "sweep", "job", str(folder.path)])
    names = " ".join(shlex.quote(job.name) for job in jobs)
    here = shlex.quote(os.getcwd())
    write_text(script, _SBATCH.format(options="\n".join(lines), names=names, command=command, here=here))
    print(script)
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch here: run `sbatch {script}` where there is one")
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    print(done.stdout.strip())


def run_ray(folder: SweepFolder, jobs: list[Job], settings: DictConfig) -> dict[str, str]:
    """Run each job as a Ray task; gives the outcome by job name.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher=ray needs Ray: pip install ray, or take launcher=local") from error
    launcher = settings.launcher
    try:
        ray.init(address=launcher.address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(f"no Ray at {launcher.address}: {error}") from error
    gpus = launcher.gpus if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=launcher.threads, num_gpus=gpus, max_retries=launcher.retries)(run_one)
    pending = {task.remote(folder, job, settings): job for job in jobs}
    outcomes = {}
    with tqdm(total=len(jobs), desc="sweep", unit="job") as bar:
        while pending:
            ready, _ = ray.wait(list(pending))
            job = pending.pop(ready[0])
            outcomes[job.name] = ray.get(ready[0])
            bar.update()
    return outcomes


def _places(launcher: DictConfig) -> dict[int, str | None]:
    """The places where a job can run at one time, each with its GPUs (None: there are none)."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    if gpus and launcher.gpus:
        shares = [",".join(gpus[i : i + launcher.gpus]) for i in range(0, len(gpus), launcher.gpus)]
        shares = [share for share in shares if share.count(",") == launcher.gpus - 1]
        if not shares:
            raise UserError(f"launcher.gpus={launcher.gpus}: there are {len(gpus)} GPUs here")
        return dict(enumerate(shares[: launcher.parallel]))
    room = max(1, len(os.sched_getaffinity(0)) // launcher.threads)
    return dict.fromkeys(range(launcher.parallel or room))


_SBATCH = """\
#!/bin/bash
{options}
#SBATCH --requeue
#SBATCH --open-mode=append
cd {here}
jobs=({names})
{command} "${{jobs[$SLURM_ARRAY_TASK_ID]}}" &
pid=$!
trap 'kill -USR1 $pid' USR1
wait $pid
code=$?
while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done
if [ $code -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit $code
"""
