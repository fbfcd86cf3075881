"""Where the jobs of a sweep run: processes of this machine, a Slurm array, Ray tasks."""

import sys
from collections.abc import Callable, Iterable
from functools import partial

from omegaconf import DictConfig
from tqdm import tqdm

from ssmttm.errors import Preempted
from ssmttm.launch import local, slurm
from ssmttm.launch.job import STOPPED, CommandJob
from ssmttm.launch.ray import RayExecutor
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job
from ssmttm.sweeps.training_job import TrainingJob


def run_job(folder: SweepFolder, settings: DictConfig, job: Job) -> str:
    """Run one job to its end and return its outcome, as a Slurm or Ray task does.

    Raises:
        Preempted: a signal came; the job has written its checkpoint.
    """
    training = TrainingJob(folder, job, settings)
    outcome, _ = local.run_to_end(training)
    if outcome == STOPPED:
        raise Preempted(f"{job.name} stopped {training.progress()}: run it again to resume")
    return str(outcome)


def run_local(
    folder: SweepFolder,
    jobs: Iterable[Job],
    settings: DictConfig,
    total: int,
    on_end: Callable[[CommandJob, str], None] = lambda job, outcome: None,
) -> None:
    """Run jobs as processes of this machine (see `local.run_jobs`); `total` is for the progress bar."""
    launcher = settings.launcher
    slots = local.slots(launcher.gpus, launcher.threads, launcher.parallel)
    resume_hint = f"finished training is kept in {folder.path}: run the same command to resume"
    with tqdm(total=total, desc="sweep", unit="job") as bar:
        local.run_jobs(
            jobs, lambda job, slot: TrainingJob(folder, job, settings, slot), slots, on_end, bar, resume_hint
        )


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
        "output": folder.path / "slurm-%a.log",
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
