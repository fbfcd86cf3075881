"""Search instead of a grid: Optuna proposes each job's settings and learns from its validation loss.

The study is a journal file in the sweep's folder: a search that was killed goes on with the trials it had begun.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job, make_job, sized
from ssmttm.sweeps.launch import run_local
from ssmttm.sweeps.work import DONE, STOPPED, read_metrics


def run_search(folder: SweepFolder, settings: DictConfig) -> None:
    """Work through `sweep.search`: so many trials, as many at once as the launcher has room for.

    Raises:
        UserError: Optuna is not installed, a parameter is neither a range nor a list of choices, or another launcher
            than local.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError as error:
        raise UserError("sweep.search needs Optuna: pip install optuna, or write a grid") from error
    if settings.launcher.kind != "local":
        raise UserError("sweep.search runs with launcher=local only: each trial waits for what earlier ones showed")
    search, seed = settings.sweep.search, int(settings.sweep.seeds[0])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder.path / "study.log"))),
        sampler=optuna.samplers.TPESampler(seed=seed + len(list(folder.path.glob("jobs/*")))),
        study_name=settings.sweep.name,
        direction=search.direction,
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    numbers: dict[str, int] = {}

    def proposals() -> Iterator[Job]:
        begun = study.get_trials(states=(states.RUNNING,))
        yield from (enter(trial.number, trial.params) for trial in begun if trial.params)
        while len(study.get_trials(states=(states.COMPLETE, states.FAIL, states.RUNNING))) < search.trials:
            trial = study.ask()
            yield enter(trial.number, {name: _suggest(trial, name, kind) for name, kind in search.parameters.items()})

    def enter(number: int, values: dict[str, Any]) -> Job:
        labels = {"trial": f"trial{number:04d}", "seed": str(seed)}
        chosen = [f"{name}={value}" for name, value in values.items()]
        overrides = [f"experiment={settings.sweep.experiment}", *settings.sweep.overrides, *chosen, f"seed={seed}"]
        budget = {kind: amount for kind, amount in settings.sweep.budget.items() if amount is not None}
        job = make_job(labels, sized(overrides, settings.sweep), budget)
        folder.enter([job])
        numbers[job.name] = number
        return job

    def finished(job: Job, outcome: str) -> None:
        if outcome == DONE:
            study.tell(numbers[job.name], _last(folder.job_folder(job.name) / "run", settings.sweep.metric))
        elif outcome != STOPPED:
            study.tell(numbers[job.name], state=states.FAIL)

    over = len(study.get_trials(states=(states.COMPLETE, states.FAIL)))
    run_local(folder, proposals(), settings, search.trials - over, finished)
    if study.get_trials(states=(states.COMPLETE,)):
        chosen = " ".join(f"{name}={value}" for name, value in study.best_params.items())
        print(f"best of {len(study.trials)} trials: {settings.sweep.metric} {study.best_value:.4f} with {chosen}")


def _suggest(trial: Any, name: str, kind: Any) -> Any:
    if OmegaConf.is_list(kind):
        return trial.suggest_categorical(name, list(kind))
    if OmegaConf.is_dict(kind) and {"low", "high"} <= kind.keys() <= {"low", "high", "log"}:
        whole = isinstance(kind.low, int) and isinstance(kind.high, int)
        suggest = trial.suggest_int if whole else trial.suggest_float
        return suggest(name, kind.low, kind.high, log=bool(kind.get("log", False)))
    raise UserError(f"sweep.search.parameters.{name}: write {{low: 1, high: 2, log: true}} or a list of choices")


def _last(run: Path, metric: str) -> float:
    values = [row[metric] for row in read_metrics(run) if metric in row]
    if not values:
        raise UserError(f"{run} has no {metric}: set sweep.metric to a name in its metrics.jsonl")
    return values[-1]
