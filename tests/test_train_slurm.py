"""A training on Slurm: its script is run by a stand-in that enforces a time limit, and requeued until it is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import base, flat
from small_runs import metric_rows
from small_stores import lm_config, write_codes_store

from ssmttm import checkpoint
from ssmttm.cli import main
from ssmttm.errors import UserError

ROOT = Path(__file__).parents[1]
# Sends USR1 when the third line of metrics is written, as if the time limit were near, and kills what is left later.
SLURM = """\
#!/bin/bash
while
    rm -f requeued
    SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=0 setsid bash "$1" >> out.txt 2>&1 &
    pid=$!
    if [ ! -e signalled ]; then
        until [ "$(wc -l < "$2/metrics.jsonl" 2> /dev/null || echo 0)" -ge 3 ] || ! kill -0 $pid; do sleep 0.02; done
        kill -USR1 $pid
        touch signalled
        (sleep 60; kill -KILL -- -$pid) 2> /dev/null &
        limit=$!
    fi
    wait $pid
    code=$?
    echo "$code" >> codes.txt
    [ -e requeued ]
do :; done
kill $limit 2> /dev/null
exit 0
"""


@pytest.mark.parametrize("processes", [2])
def test_training_is_requeued_at_its_time_limit_until_it_is_done(tmp_path, monkeypatch, processes):
    store = write_codes_store(tmp_path / "codes")
    run_dir = tmp_path / "my run, with a comma"
    steps = ("train.steps=120", "train.eval_every=0", "train.checkpoint_every=0", "data.batch_size=2")
    settings = lm_config(store, tmp_path / "unused", *steps)
    overrides = [f"{key}={'null' if value is None else value}" for key, value in flat(settings).items()]
    overrides = [override for override in overrides if not override.startswith("run_dir=")]
    monkeypatch.chdir(tmp_path)
    script = ["slurm", "train.sbatch", "--gpus", "0", "--processes", str(processes), "--time", "00:10:00"]
    main.main([*script, *base(settings), *overrides, f"run_dir='{run_dir}'"])
    text = Path("train.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@300" in text and "#SBATCH --requeue" in text and "--time=00:10:00" in text
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, program in (("slurm", SLURM), ("scontrol", "#!/bin/bash\necho $2 > requeued\n")):
        (bin_folder / name).write_text(program)
        (bin_folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["slurm", "train.sbatch", str(run_dir)], env=environment, check=True, timeout=120)
    output = (tmp_path / "out.txt").read_text()
    assert (tmp_path / "codes.txt").read_text().split() == ["75", "0"], output
    assert checkpoint.read_state(checkpoint.latest_good(run_dir))["step"] == 120
    assert [row["step"] for row in metric_rows(run_dir)] == list(range(1, 121))
    assert f"{processes} x cpu" in output and "resumed from" in output


def test_ranks_end_together_with_the_code_of_the_one_that_failed(tmp_path):
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    command = [sys.executable, "-m", "ssmttm.launch.ranks", "2", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, timeout=30).returncode == 3


def test_script_that_cannot_be_written_is_one_clear_line():
    with pytest.raises(UserError, match="name of one script"):
        main.main(["slurm", "experiment=debug"])
    with pytest.raises(UserError, match="leave resume out"):
        main.main(["slurm", "x.sbatch", "experiment=debug", "resume=none"])
