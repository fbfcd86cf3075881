"""Search instead of a grid: Optuna proposes each job's settings and learns from its validation loss.

The study is a journal file in the sweep's folder: a search that was killed goes on with the trials it had begun.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.launch.sweep_launchers import run_local
from ssmttm.launch.training_job import DONE, STOPPED, read_metrics
from ssmttm.sweeps.folder import SweepFolder
from ssmttm.sweeps.jobs import Job, budget_of, check, make_job, sized


def run_search(folder: SweepFolder, settings: DictConfig) -> None:
    """Work through `sweep.search`: so many trials, as many at once as the launcher has room for.

    Raises:
        UserError: the sweep is none (`jobs.check`), Optuna is not installed, trials or parameters are not given, a
            parameter is neither a range nor a list of choices, or another launcher than local.
    """
    check(settings.sweep)
    search, seed = settings.sweep.search, int(settings.sweep.seeds[0])
    if missing := [name for name in ("trials", "parameters") if not search.get(name)]:
        raise UserError(f"sweep.search has no {missing[0]}: write {{trials: 20, parameters: {{KEY: {{low, high}}}}}}")
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError as error:
        raise UserError("sweep.search needs Optuna: pip install optuna, or write a grid") from error
    if settings.launcher.kind != "local":
        raise UserError("sweep.search runs with launcher=local only: each trial waits for what earlier ones showed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder.path / "study.log"))),
        sampler=optuna.samplers.TPESampler(seed=seed + len(list(folder.path.glob("jobs/*")))),
        study_name=settings.sweep.name,
        direction=search.get("direction", "minimize"),
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    numbers: dict[str, int] = {}

    def chosen() -> list[Any]:
        """Trials whose settings are all chosen, to whatever end they came; a kill may leave one without."""
        return [trial for trial in study.get_trials() if trial.params.keys() == set(search.parameters)]

    def proposals() -> Iterator[Job]:
        whole = {trial.number for trial in chosen()}
        for trial in study.get_trials(states=(states.RUNNING,)):
            if trial.number in whole:
                yield enter(trial.number, trial.params)
            else:
                study.tell(trial.number, state=states.FAIL)
        while len(chosen()) < search.trials:
            trial = study.ask()
            yield enter(trial.number, {name: _suggest(trial, name, kind) for name, kind in search.parameters.items()})

    def enter(number: int, values: dict[str, Any]) -> Job:
        labels = {"trial": f"trial{number:04d}", "seed": str(seed)}
        picked = [f"{name}={value}" for name, value in values.items()]
        overrides = [f"experiment={settings.sweep.experiment}", *settings.sweep.overrides, *picked, f"seed={seed}"]
        job = make_job(labels, sized(overrides, settings.sweep), budget_of(settings.sweep))
        folder.enter([job])
        numbers[job.name] = number
        return job

    def finished(job: Job, outcome: str) -> None:
        if outcome == DONE:
            study.tell(numbers[job.name], _last(folder.job_folder(job.name) / "run", settings.sweep.metric))
        elif outcome != STOPPED:
            study.tell(numbers[job.name], state=states.FAIL)

    over = sum(trial.state in (states.COMPLETE, states.FAIL) for trial in chosen())
    run_local(folder, proposals(), settings, search.trials - over, finished)
    if study.get_trials(states=(states.COMPLETE,)):
        best = " ".join(f"{name}={value}" for name, value in study.best_params.items())
        print(f"best of {len(chosen())} trials: {settings.sweep.metric} {study.best_value:.4f} with {best}")


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
