"""`ssmttm sweep`: start or resume a sweep."""

from pathlib import Path

from omegaconf import DictConfig

from ssmttm.errors import UserError
from ssmttm.files import directory_lock
from ssmttm.sweeps import launchers
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import expand
from ssmttm.sweeps.search import run_search


def run_sweep(settings: DictConfig) -> SweepFolder:
    """Run every job that is not done.

    Args:
        settings: the composed configs/sweep.yaml.

    Raises:
        UserError: invalid settings, or jobs that failed in the end (all others are done then).
        Preempted, KeyboardInterrupt: a signal came; the same call resumes.
    """
    if not settings.store:
        raise UserError("store is not set: set store=DIR, made by `python -m data_prep`")
    settings = settings.copy()
    settings.store = str(Path(settings.store).resolve())
    jobs = [] if settings.sweep.search else expand(settings.sweep)
    folder, evaluate = SweepFolder(Path(settings.out).resolve()), settings.sweep.evaluate
    with directory_lock(folder.path, "sweep"):
        folder.require_store(settings.store)
        folder.add_jobs(jobs)
        folder.write_config(settings)
        if settings.sweep.search:
            run_search(folder, settings)
            return folder
        pending = [job for job in jobs if not folder.is_done(job.name, evaluate)]
        print(f"{len(jobs)} jobs, {len(jobs) - len(pending)} of them done, in {folder.path}")
        if not pending:
            return folder
        if settings.launcher.kind == "slurm":
            launchers.submit_slurm(folder, pending, settings)
            return folder
        if settings.launcher.kind == "ray":
            launchers.run_ray(folder, pending, settings)
        else:
            launchers.run_local(folder, pending, settings, len(pending))
        failed = [job.name for job in pending if not folder.is_done(job.name, evaluate)]
        if failed:
            logs = folder.job_folder("NAME") / "log.txt"
            raise UserError(f"{len(failed)} jobs failed ({', '.join(failed)}): see {logs}; run again to retry them")
    return folder
