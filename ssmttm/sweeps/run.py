"""`ssmttm sweep`: start a sweep, or go on with it."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.files import directory_lock
from ssmttm.launch.sweep_launchers import run_local, run_ray, run_slurm
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import expand
from ssmttm.sweeps.search import run_search


def run_sweep(settings: DictConfig) -> SweepFolder:
    """Run every job that is not done.

    Args:
        settings: configs/sweep.yaml, composed.

    Raises:
        UserError: settings that cannot be run, or jobs that failed in the end (all others are done then).
        Preempted, KeyboardInterrupt: a signal came; the same call goes on.
    """
    if not settings.store:
        raise UserError("store is not set: give store=DIR, made by `python -m data_prep`")
    settings = OmegaConf.merge(settings, {"store": str(Path(settings.store).resolve())})
    jobs = [] if settings.sweep.search else expand(settings.sweep)
    folder, evaluate = SweepFolder(Path(settings.out).resolve()), settings.sweep.evaluate
    with directory_lock(folder.path, "sweep"):
        folder.require_store(settings.store)
        folder.enter(jobs)
        folder.write_config(settings)
        if settings.sweep.search:
            run_search(folder, settings)
            return folder
        left = [job for job in jobs if not folder.is_done(job.name, evaluate)]
        print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them done, in {folder.path}")
        if not left:
            return folder
        if settings.launcher.kind == "slurm":
            run_slurm(folder, left, settings)
            return folder
        if settings.launcher.kind == "ray":
            run_ray(folder, left, settings)
        else:
            run_local(folder, left, settings, len(left))
        if failed := [job.name for job in left if not folder.is_done(job.name, evaluate)]:
            logs = folder.job_folder("NAME") / "log.txt"
            raise UserError(f"{len(failed)} jobs failed ({', '.join(failed)}): see {logs}; run again to retry them")
    return folder
