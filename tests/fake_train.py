"""A fake train.py for tests of sweeps: writes a run folder without training.

A step takes 20 ms; `train.log_every=666` crashes at step 3, 667 is a user error, 668 crashes once and then resumes, 669
is pre-empted once, 670 kills itself, 671 does so once, 672 needs 4 s to write its checkpoint after SIGTERM.
FAKE_IMPORTS is the import time in seconds. As with train.py, a locked run folder is a user error.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

settings = {key: value.strip("'") for key, _, value in (word.partition("=") for word in sys.argv[1:])}
run = Path(settings["run_dir"])
run.mkdir(parents=True, exist_ok=True)
time.sleep(float(os.environ.get("FAKE_IMPORTS", "0")))
lock = (run / ".lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("error: another training is writing here")
    sys.exit(2)
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
with (run / "starts").open("a") as starts:
    starts.write("start\n")
behaviour = settings.get("train.log_every")
if behaviour == "667":
    sys.exit(2)
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) // 2 if metrics.exists() else 0
rate = float(settings.get("optim.lr", 1e-3))
with metrics.open("a", buffering=1) as file:
    for step in range(done + 1, int(settings["train.steps"]) + 1):
        first_start = len((run / "starts").read_text().split()) == 1
        if step == 3 and (behaviour == "666" or (behaviour == "668" and first_start)):
            sys.exit("it crashed on purpose")
        if step == 3 and behaviour == "669" and first_start:
            sys.exit(75)
        if step == 3 and (behaviour == "670" or (behaviour == "671" and first_start)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        totals = {"samples": 8 * step, "flops": 1e9 * step, "seconds": 0.02 * step, "seconds_per_step": 0.02}
        loss = abs(math.log10(rate) + 2.5) + 1 / step + 0.01 * int(settings.get("seed", 0))
        file.write(json.dumps({"step": step, "loss": loss, **totals}) + "\n")
        file.write(json.dumps({"step": step, "valid/loss": loss}) + "\n")
        if signals:
            time.sleep(4 if behaviour == "672" else 0)
            sys.exit(75)
