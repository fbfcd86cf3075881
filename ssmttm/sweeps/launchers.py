"""Where the jobs of a sweep run: processes of this machine, a Slurm array, Ray tasks."""

import sys
from collections.abc import Callable, Iterable
from functools import partial

from omegaconf import DictConfig
from tqdm import tqdm

from ssmttm.errors import Preempted
from ssmttm.launch import local, slurm
from ssmttm.launch.job import FAILED, STOPPED, error_of
from ssmttm.launch.ray import RayExecutor
from ssmttm.signals import stop_requests
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job
from ssmttm.sweeps.training_job import TrainingJob


def run_job(folder: SweepFolder, settings: DictConfig, job: Job) -> str:
    """Run one job to its end and return its outcome, as a Slurm or Ray task does.

    Raises:
        Preempted: a signal came; the job has written its checkpoint.
    """
    training = TrainingJob(folder, job, settings)
    with stop_requests() as received:
        outcome = training.run(received)
    if outcome == STOPPED:
        raise Preempted(f"{job.name} stopped at step {training.step()}: run it again to resume")
    return outcome


def run_local(
    folder: SweepFolder,
    jobs: Iterable[Job],
    settings: DictConfig,
    total: int,
    on_end: Callable[[Job, str], None] = lambda job, outcome: None,
) -> None:
    """Run jobs as processes of this machine (see `local.run_jobs`); `total` is for the progress bar."""
    launcher = settings.launcher
    slots = local.slots(launcher.gpus, launcher.threads, launcher.parallel)
    steps: dict[str, int] = {}
    with tqdm(total=total, desc="sweep", unit="job") as bar:

        def run(job: Job, slot: local.Slot, stopping: Callable[[], int]) -> str:
            training = TrainingJob(folder, job, settings, slot)

            def show_step() -> None:
                step = training.step()
                if step != steps.get(job.name):  # redrawn at every call, the bar would fill a log
                    steps[job.name] = step
                    bar.set_postfix(steps)

            return training.run(stopping, show_step)

        def finish(job: Job, outcome: str) -> None:
            steps.pop(job.name, None)
            on_end(job, outcome)
            bar.update(outcome != STOPPED)
            if outcome == FAILED:
                job_folder = folder.job_folder(job.name)
                bar.write(f"{job.name} failed ({job_folder / 'log.txt'}):\n{error_of(job_folder)}", file=sys.stderr)

        hint = f"finished training is kept in {folder.path}: run the same command to resume"
        local.run_jobs(jobs, run, slots, finish, hint)


def submit_slurm(folder: SweepFolder, jobs: list[Job], settings: DictConfig) -> None:
    """Write OUT/sweep.sbatch, an array with one task a job, and submit it."""
    launcher, script = settings.launcher, folder.path / "sweep.sbatch"
    options = {
        "job-name": f"sweep-{settings.sweep.name}",
        "array_limit": launcher.parallel,
        "gpus": launcher.gpus,
        "cpus-per-task": launcher.threads,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "output": slurm.log_pattern(folder.path, "slurm-%a.log"),
    }
    command = [sys.executable, "-m", "ssmttm.cli.main", "sweep", "job", str(folder.path)]
    slurm.write_script(script, command, [job.name for job in jobs], options)
    slurm.submit([script])


def run_ray(folder: SweepFolder, jobs: list[Job], settings: DictConfig) -> None:
    """Run each job as a Ray task."""
    launcher = settings.launcher
    with RayExecutor(launcher.address, launcher.threads, launcher.gpus, launcher.retries) as executor:
        outcomes = executor.run(partial(run_job, folder, settings), jobs, "the sweep")
        for _ in tqdm(outcomes, total=len(jobs), desc="sweep", unit="job"):
            pass
