"""Slurm scripts run by a fake sbatch: the chain of arrays makes the same store as local processes."""

import os
from pathlib import Path

from planted import RATE, music, save
from small_stores import small_codec

from data_prep import __main__ as command
from data_prep.status import WORK
from ssmttm.data import open_store

SBATCH = """\
#!/bin/bash
# Runs all tasks of the script (the last argument) here, the last one first; hands out 100, 101, ...
# The first cut task comes near its time limit when it has begun a shard. A task that fails would hold up the chain.
script="${@: -1}"
echo "$*" >> "$0.log"
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
for task in $(seq "$last" -1 0); do
    while
        rm -f requeued
        SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$script" >> "$0.out" 2>&1 &
        pid=$!
        if [[ $script == *-cut.sbatch && ! -e signalled ]]; then
            until compgen -G "by slurm"/*/cut-*/.*.tmp || ! kill -0 $pid; do sleep 0.01; done > /dev/null
            kill -USR1 $pid
            touch signalled
        fi
        wait $pid
        code=$?
        [ -e requeued ]
    do cat requeued >> requeues; done
    [ $code -eq 0 ] || { echo "task $task of $script ended with $code" >&2; exit 1; }
done
echo "$((99 + $(wc -l < "$0.log")));cluster"
"""


SCONTROL = '#!/bin/bash\n[ "$1" = requeue ] && echo "$2" > requeued\n'


def test_slurm_chain_makes_the_same_store_as_processes(tmp_path, monkeypatch, capsys):
    for index in range(6):
        save(tmp_path / "music" / f"{index}.wav", music(index)[: 6 * RATE])
    save(tmp_path / "music" / "short.wav", music(6)[:RATE])
    save(tmp_path / "music" / "nd.wav", music(7)[: 6 * RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,licence\nnd.wav,CC BY-ND 4.0\n")
    small_codec(tmp_path / "codec")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    scontrol = sbatch.with_name("scontrol")
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    words = ["folder", "--root", "music", "--licence", "CC0-1.0", "--workers", "1", "--text", "none",
             "--codec", str(tmp_path / "codec"), "--sample-rate", "8000"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command.main([*words, "--out", "by processes"])
    command.main([*words, "--out", "by slurm", "--executor", "slurm", "--tasks", "2"])
    one, other = open_store(tmp_path / "by processes"), open_store(tmp_path / "by slurm")
    assert one.fingerprint == other.fingerprint and len(one) == 6
    assert (tmp_path / "requeues").read_text() == "7_1\n"
    for name in ("rejected.csv", "ATTRIBUTION.csv", "decontamination.json"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    rejected = (other.path / "rejected.csv").read_text()
    assert "short.wav,cut,short" in rejected and "nd.wav,plan,licence" in rejected
    stages = ["0-plan", "1-reference", "2-cut", "3-select", "4-codes", "5-pack"]
    calls = (tmp_path / "bin" / "sbatch.log").read_text().splitlines()
    assert [Path(line.split(" ", 1)[1].split("sbatch ")[-1]).stem for line in calls] == stages
    assert ["--dependency" in line for line in calls] == [False, True, True, True, True, True]
    assert not list((other.path / WORK).glob("**/.*.tmp"))
    capsys.readouterr()
    command.main([*words, "--out", "by slurm"])
    assert "shards" not in capsys.readouterr().err  # nothing is rebuilt
    assert open_store(tmp_path / "by slurm").fingerprint == other.fingerprint
