#!/bin/bash
# TensorBoard's EventAccumulator reads event files in the order of their names, where .10 comes before .9: of 12 sessions
# begun by one process within one second, each with a start mark (as SummaryWriter(purge_step=...) writes it), the start
# of the third, read last, hides what the eleventh and twelfth wrote.
# A guess would be that files are read in the order they were written in, so that a start mark hides only what it replaces.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboard==2.21.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON' 2>/dev/null
import sys
import time
from pathlib import Path

import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

print(f"tensorboard {tensorboard.__version__}: sessions of 3 steps each, every one from where the last ended")
run = Path(sys.argv[1], "run")
time.sleep(1 - time.time() % 1)  # all sessions within one second, which the names of the files begin with
for session in range(12):
    writer, first = EventFileWriter(str(run)), 3 * session
    writer.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
    for step in range(first, first + 3):
        writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag="loss", simple_value=1.0)])))
    writer.close()
seconds = {path.name.split(".")[3] for path in run.iterdir()}
print(f"in the order of their names: {[int(path.suffix[1:]) for path in sorted(run.iterdir())]}, in {len(seconds)} second(s)")
accumulator = EventAccumulator(str(run))
accumulator.Reload()
steps = [event.step for event in accumulator.Scalars("loss")]
print(f"of the steps 0 to 35, shown: {steps[0]} to {steps[-1]} ({len(steps)})")
sys.exit(0 if len(seconds) == 1 and steps == list(range(30)) else 1)
PYTHON
