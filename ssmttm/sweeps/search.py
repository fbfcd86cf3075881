"""Search instead of a grid: Optuna proposes the settings of each job from the validation losses of earlier ones.

The study is a journal file in the sweep's folder, so a killed search continues with the trials it had started. A trial
whose training failed stays open in the study, so that it is run again by the next start of the search.
"""

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.launch.job import DONE
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job, budget_of, check_sweep, make_job, match_size
from ssmttm.sweeps.launchers import run_local
from ssmttm.sweeps.training_job import read_metrics


def run_search(folder: SweepFolder, settings: DictConfig) -> None:
    """Run the trials of `sweep.search`, as many at a time as the launcher has slots.

    Raises:
        UserError: see `check_sweep`; Optuna is not installed; trials or parameters are missing; a parameter is neither
            a range nor a list of choices; the launcher is not local; trials failed (all others are done then).
    """
    check_sweep(settings.sweep)
    for name in ("trials", "parameters"):
        if not settings.sweep.search.get(name):
            raise UserError(f"sweep.search has no {name}: write {{trials: 20, parameters: {{KEY: {{low, high}}}}}}")
    if settings.launcher.kind != "local":
        raise UserError("sweep.search needs launcher=local: each trial depends on the results of earlier ones")
    search = _Search(folder, settings.sweep)
    run_local(folder, search.jobs(), settings, search.n_left(), search.on_end)
    search.print_best()
    search.check_failed()


class _Search:
    """Jobs from the trials of a study."""

    def __init__(self, folder: SweepFolder, sweep: DictConfig) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend, JournalStorage
        except ImportError as error:
            raise UserError("sweep.search needs Optuna: pip install optuna, or use a grid") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._folder, self._sweep, self._seed = folder, sweep, int(sweep.seeds[0])
        self._states = optuna.trial.TrialState
        self._trials: dict[str, int] = {}  # number of the trial, by job name
        journal = JournalFileBackend(str(folder.path / "study.log"))
        self._study = optuna.create_study(
            storage=JournalStorage(journal),
            sampler=optuna.samplers.TPESampler(seed=self._seed + len(list(folder.path.glob("jobs/*")))),
            study_name=sweep.name,
            direction=sweep.search.get("direction", "minimize"),
            load_if_exists=True,
        )

    def n_left(self) -> int:
        """Trials without a result."""
        return self._sweep.search.trials - len(self._study.get_trials(states=(self._states.COMPLETE,)))

    def jobs(self) -> Iterator[Job]:
        """The trials that failed or were running when the search stopped, then new ones."""
        for trial in self._study.get_trials(states=(self._states.RUNNING,)):
            if self._has_all_parameters(trial):
                yield self._job(trial.number, trial.params)
            else:
                self._study.tell(trial.number, state=self._states.FAIL)
        parameters = self._sweep.search.parameters
        while len(self._trials_in_study()) < self._sweep.search.trials:
            new = self._study.ask()
            yield self._job(new.number, {name: _suggest(new, name, kind) for name, kind in parameters.items()})

    def on_end(self, job: Job, outcome: str) -> None:
        """Report a trial's value, if it has one."""
        if outcome == DONE:
            self._study.tell(self._trials[job.name], self._last_value(job))

    def _last_value(self, job: Job) -> float:
        """The last value of the metric; the worst of all if it is not a number, as Optuna accepts no NaN."""
        run, metric = self._folder.job_folder(job.name) / "run", self._sweep.metric
        values = [row[metric] for row in read_metrics(run) if metric in row]
        if not values:
            raise UserError(f"{run} has no {metric}: set sweep.metric to a name in its metrics.jsonl")
        worst = math.inf if self._study.direction.name == "MINIMIZE" else -math.inf
        return worst if math.isnan(values[-1]) else values[-1]

    def print_best(self) -> None:
        """Print the best trial, if there is one."""
        if n := len(self._study.get_trials(states=(self._states.COMPLETE,))):
            best = " ".join(f"{name}={value}" for name, value in self._study.best_params.items())
            print(f"best of {n} trials: {self._sweep.metric} {self._study.best_value:.4f} with {best}")

    def check_failed(self) -> None:
        """Raises UserError if trials have failed, or if no trial has a finite value."""
        failed = [name for name in self._trials if self._folder.is_failed(name)]
        if failed:
            logs = self._folder.job_folder("NAME") / "log.txt"
            n, names = self._sweep.search.trials, ", ".join(failed)
            raise UserError(f"{len(failed)} of {n} trials failed ({names}): see {logs}; run again to retry them")
        if not math.isfinite(self._study.best_value):
            raise UserError(f"no trial has a finite {self._sweep.metric}: search other ranges, with another out=DIR")

    def _trials_in_study(self) -> list[Any]:
        """Finished and open trials."""
        trials = self._study.get_trials(states=(self._states.COMPLETE, self._states.RUNNING))
        return [trial for trial in trials if self._has_all_parameters(trial)]

    def _has_all_parameters(self, trial: Any) -> bool:
        """A kill may leave a trial with some of them only."""
        return trial.params.keys() == set(self._sweep.search.parameters)

    def _job(self, number: int, values: dict[str, Any]) -> Job:
        labels = {"trial": f"trial{number:04d}", "seed": str(self._seed)}
        chosen = [f"{name}={value}" for name, value in values.items()]
        sweep = self._sweep
        overrides = [f"experiment={sweep.experiment}", *sweep.overrides, *chosen, f"seed={self._seed}"]
        job = make_job(labels, match_size(overrides, sweep), budget_of(sweep))
        self._folder.add_jobs([job])
        self._trials[job.name] = number
        return job


def _suggest(trial: Any, name: str, kind: Any) -> Any:
    if OmegaConf.is_list(kind):
        return trial.suggest_categorical(name, list(kind))
    if OmegaConf.is_dict(kind) and {"low", "high"} <= kind.keys() <= {"low", "high", "log"}:
        integer = isinstance(kind.low, int) and isinstance(kind.high, int)
        suggest = trial.suggest_int if integer else trial.suggest_float
        return suggest(name, kind.low, kind.high, log=bool(kind.get("log", False)))
    raise UserError(f"sweep.search.parameters.{name} must be {{low: 1, high: 2, log: true}} or a list of choices")
