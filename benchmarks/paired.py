"""Timing of alternatives in turn within one run, so that noise of the machine affects all of them equally."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

Times = dict[str, list[float]]


def paired(cases: Mapping[str, Callable[[], Any]], rounds: int, title: str) -> Times:
    """Seconds of each case in each round; the cases run in turn, and each round starts with another one.

    A first round is warm-up and is not kept.
    """
    names = list(cases)
    times: Times = {name: [] for name in names}
    for round_index in tqdm(range(-1, rounds), desc=title, unit="round", leave=False):
        for place in range(len(names)):
            name = names[(round_index + place) % len(names)]
            begun = time.perf_counter()
            cases[name]()
            if round_index >= 0:
                times[name].append(time.perf_counter() - begun)
    return times


def summary(times: Times, ours: str) -> dict[str, dict[str, float]]:
    """Median and 10th percentile of each case in milliseconds, and the ratio of its time to that of `ours`: the median
    over rounds."""
    base = np.array(times[ours])
    return {
        name: {
            "median_ms": 1e3 * float(np.median(values)),
            "p10_ms": 1e3 * float(np.percentile(values, 10)),
            "ratio": float(np.median(np.array(values) / base)),
        }
        for name, values in times.items()
    }


def environment() -> dict[str, Any]:
    """Machine, threads, load and versions, which the figures depend on."""
    import transformers

    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def report(results: dict[str, dict[str, dict[str, float]]], out: Path, title: str) -> None:
    """Print the tables, and write OUT.json and OUT.png, a bar a case."""
    for row, cases in results.items():
        print(f"\n{row}")
        for name, metrics in cases.items():
            line = f"{metrics['median_ms']:10.2f} ms   p10 {metrics['p10_ms']:10.2f} ms   x {metrics['ratio']:.2f}"
            print(f"  {name:34} {line}")
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "results": results}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    metric, axes = plt.subplots(len(results), 1, figsize=(8, 0.6 + 1.5 * len(results)), squeeze=False)
    for axis, (row, cases) in zip(axes[:, 0], results.items(), strict=True):
        names = list(cases)[::-1]
        axis.barh(names, [cases[name]["median_ms"] for name in names], color="#4477aa")
        axis.set_title(row, fontsize=9, loc="left")
        axis.set_xlabel("ms, median", fontsize=8)
        axis.tick_params(labelsize=8)
    metric.suptitle(title, fontsize=10)
    metric.tight_layout()
    metric.savefig(out.with_suffix(".png"), dpi=120)
    print(f"\n{out.with_suffix('.json')}\n{out.with_suffix('.png')}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
