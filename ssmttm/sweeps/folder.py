"""A sweep's folder: which jobs it holds, and which of them are done.

    OUT/sweep.yaml      the sweep as it was last started
    OUT/jobs/NAME/      one job, see `work`
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.launch.training_job import is_done
from ssmttm.sweeps.jobs import Job


class SweepFolder:
    """Where a sweep keeps its jobs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def job_folder(self, name: str) -> Path:
        """JOB."""
        return self.path / "jobs" / name

    def is_done(self, name: str, evaluate: Sequence[str] | None = None) -> bool:
        """Whether a job has finished its training, and this evaluation if one is asked for."""
        return is_done(self.job_folder(name), evaluate)

    def write_config(self, config: DictConfig) -> None:
        """Keep the sweep as it is started now."""
        write_text(self.path / "sweep.yaml", OmegaConf.to_yaml(config))

    def require_store(self, store: str) -> None:
        """Raises UserError if the sweep was begun on another store: its jobs could not be compared."""
        before = self.config().store if (self.path / "sweep.yaml").is_file() else store
        if Path(before).resolve() != Path(store).resolve():
            raise UserError(f"{self.path} was begun with store={before}, not {store}: give that, or another out=DIR")

    def config(self) -> DictConfig:
        """The sweep as it was last started. Raises UserError if the folder is no sweep's."""
        path = self.path / "sweep.yaml"
        if not path.is_file():
            raise UserError(f"{self.path} is no sweep's folder (it has no sweep.yaml): give the `out` of a sweep")
        return OmegaConf.load(path)

    def enter(self, jobs: Iterable[Job]) -> None:
        """Write each job.json.

        Raises:
            UserError: a job of that name was begun with other settings; nothing is written then.
        """
        jobs = list(jobs)
        for job in jobs:
            path = self.job_folder(job.name) / "job.json"
            if path.is_file() and json.loads(path.read_text()) != job.document():
                raise UserError(f"{path.parent} was begun with other settings: set them back, or give another out=DIR")
        for job in jobs:
            write_text(self.job_folder(job.name) / "job.json", json.dumps(job.document(), indent=1) + "\n")

    def jobs(self) -> list[Job]:
        """All jobs ever entered, by name."""
        paths = sorted((self.path / "jobs").glob("*/job.json"))
        return [Job(**json.loads(path.read_text())) for path in paths]

    def job(self, name: str) -> Job:
        """One job. Raises UserError if there is none of that name."""
        for job in self.jobs():
            if job.name == name:
                return job
        raise UserError(f"{self.path} has no job {name}: there are {', '.join(job.name for job in self.jobs())}")
