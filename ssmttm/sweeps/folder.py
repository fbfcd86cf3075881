"""A sweep's folder.

OUT/sweep.yaml      the sweep as it was last started
OUT/jobs/NAME/      one job, see `launch.job` and `training_job`
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.sweeps.jobs import Job


class SweepFolder:
    """Reads and writes the config and the jobs of a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def job_folder(self, name: str) -> Path:
        """The folder of a job."""
        return self.path / "jobs" / name

    def is_done(self, name: str, evaluate: Sequence[str] | None = None) -> bool:
        """Whether a job has finished its training and, if given, this evaluation."""
        path = self.job_folder(name) / "done.json"
        return path.is_file() and (evaluate is None or json.loads(path.read_text()).get("evaluate") == list(evaluate))

    def is_failed(self, name: str) -> bool:
        """Whether a job failed for good."""
        return (self.job_folder(name) / "failed.json").is_file()

    def write_config(self, config: DictConfig) -> None:
        """Save the sweep's config."""
        write_text(self.path / "sweep.yaml", OmegaConf.to_yaml(config))

    def require_store(self, store: str) -> None:
        """Raises UserError if the sweep was started with another store: its jobs could not be compared."""
        before = self.config().store if (self.path / "sweep.yaml").is_file() else store
        if Path(before).resolve() != Path(store).resolve():
            raise UserError(f"{self.path} was started with store={before}, not {store}: set that, or another out=DIR")

    def config(self) -> DictConfig:
        """The sweep's config. Raises UserError if the folder is not a sweep's."""
        path = self.path / "sweep.yaml"
        if not path.is_file():
            raise UserError(f"{self.path} is not the folder of a sweep (no sweep.yaml): give the `out` of a sweep")
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        return config

    def add_jobs(self, jobs: Iterable[Job]) -> None:
        """Write each job.json. Raises UserError, and writes nothing, if a job of that name has other settings."""
        documents = {self.job_folder(job.name) / "job.json": asdict(job) for job in jobs}
        for path, document in documents.items():
            if path.is_file() and json.loads(path.read_text()) != document:
                raise UserError(f"{path.parent} has other settings: restore them, or set another out=DIR")
        for path, document in documents.items():
            write_text(path, json.dumps(document, indent=1) + "\n")

    def jobs(self) -> list[Job]:
        """All jobs ever added, by name."""
        paths = sorted((self.path / "jobs").glob("*/job.json"))
        return [Job(**json.loads(path.read_text())) for path in paths]

    def job(self, name: str) -> Job:
        """One job. Raises UserError if there is none of that name."""
        jobs = {job.name: job for job in self.jobs()}
        if name not in jobs:
            raise UserError(f"{self.path} has no job {name}: its jobs are {', '.join(jobs)}")
        return jobs[name]
