#!/bin/bash
# A resumed Optuna study whose sampler has a fixed seed draws the same parameters again: RandomSampler, and TPESampler too
# in its start-up trials. A guess would be that the seed makes the whole study repeatable, across the restart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==5.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
print(f"optuna {optuna.__version__}: 6 trials of a learning rate, at once or as 3 and 3, with seed=0")


def loss(trial: optuna.Trial) -> float:
    return trial.suggest_float("lr", 1e-5, 1e-2, log=True)


repeated = []
for kind in (optuna.samplers.RandomSampler, optuna.samplers.TPESampler):
    rates = {}
    for sessions in ((6,), (3, 3)):
        name = f"{kind.__name__}, {' and '.join(map(str, sessions))}"
        for trials in sessions:
            study = optuna.create_study(
                storage=f"sqlite:///{sys.argv[1]}/studies.db", study_name=name, load_if_exists=True, sampler=kind(seed=0)
            )
            study.optimize(loss, n_trials=trials)
        rates[sessions] = [trial.params["lr"] for trial in study.trials]
        print(f"{name}: {[f'{rate:.1e}' for rate in rates[sessions]]}")
    whole, resumed = rates[6,], rates[3, 3]
    repeated.append(len(set(whole)) == 6 and resumed == whole[:3] * 2)
sys.exit(0 if all(repeated) else 1)
PYTHON
