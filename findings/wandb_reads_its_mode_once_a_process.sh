#!/bin/bash
# wandb reads WANDB_MODE once a process: set to offline between two runs, it changes nothing until wandb.teardown().
# A guess would be that wandb.init() reads it each time: a run meant to be kept offline stays disabled and nothing is kept.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet wandb==0.31.0
WANDB_DIR=$folder WANDB_SILENT=true "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys
from pathlib import Path

import wandb


def run(case: str) -> tuple[str, int]:
    one = wandb.init(project="any")
    one.log({"loss": 1.0})
    mode = one.settings.mode
    one.finish()
    kept = len(list(Path(sys.argv[1], "wandb").glob("offline-run-*")))
    print(f"{case}: the run's mode is {mode}, offline runs on the disk: {kept}")
    return mode, kept


print(f"wandb {wandb.__version__}")
os.environ["WANDB_MODE"] = "disabled"
first = run("WANDB_MODE=disabled")
os.environ["WANDB_MODE"] = "offline"
second = run("then WANDB_MODE=offline")
wandb.teardown()
third = run("then wandb.teardown()")
sys.exit(0 if first == second == ("disabled", 0) and third == ("offline", 1) else 1)
PYTHON
