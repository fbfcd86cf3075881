"""From the prompt to a WAV file of 5 s with the embedded model, and `ssmttm --help`: wall and processor time.

    git worktree add /tmp/old 147b79f
    python -m benchmarks.startup /tmp/old

The programs of both trees run in turn, each as a process of its own, with this Python. A first round, after which files
are cached and the decoding engine is compiled, is not kept. Writes benchmarks/results/startup.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "startup.json"
SAMPLE, HELP, IMPORT = "sample.py, 5 s", "ssmttm --help", "import ssmttm"


def commands(tree: Path, wav: Path) -> dict[str, list[str]]:
    """Arguments of Python, to be run in a tree."""
    command = "ssmttm.cli.main" if (tree / "ssmttm" / "cli").is_dir() else "ssmttm.cli"
    return {
        SAMPLE: ["sample.py", "a slow waltz in D minor on a music box", "--duration", "5", "--out", str(wav)],
        HELP: ["-m", command, "--help"],
        IMPORT: ["-c", "import ssmttm"],
    }


def timed(tree: Path, arguments: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a command in a tree, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the work tree to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "now": ROOT}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}
    load = [round(value, 2) for value in os.getloadavg()]  # that of other programs
    with tempfile.TemporaryDirectory() as folder:
        for name in (SAMPLE, HELP, IMPORT):
            times[name] = {tree: [] for tree in trees}
            for round_index in range(-1, arguments.rounds):
                for tree, path in trees.items():
                    seconds = timed(path, commands(path, Path(folder) / "clip.wav")[name])
                    if round_index >= 0:
                        times[name][tree].append(seconds)
    results = {}
    for name, rows in times.items():
        results[name] = {tree: _summary(values) for tree, values in rows.items()}
        pairs = list(zip(rows["now"], rows["before"], strict=True))
        for index, kind in enumerate(("wall", "cpu")):
            results[name][f"{kind} ratio"] = statistics.median(now[index] / before[index] for now, before in pairs)
        print(name, json.dumps(results[name]))
    from benchmarks.paired import environment

    document = {"environment": environment() | {"load": load}, "results": results}
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(OUT)


def _summary(values: list[tuple[float, float]]) -> dict[str, float]:
    """Medians and minima in seconds."""
    walls, cpus = zip(*values, strict=True)
    return {
        "wall_median_s": statistics.median(walls), "wall_min_s": min(walls),
        "cpu_median_s": statistics.median(cpus), "cpu_min_s": min(cpus),
    }  # fmt: skip


if __name__ == "__main__":
    main()
