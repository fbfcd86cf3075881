"""Progress of a run, read from its folder, while it runs or afterwards."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.run import STAGES
from data_prep.shard_task import DONE
from ssmttm.errors import UserError
from ssmttm.files import is_locked

WORK = "work"


def status(store: Path) -> str:
    """A table of stages (shards, hours of audio, rejections, rate, time left) and whether a run is active.

    Raises:
        UserError: `store` is not the output of a run.
    """
    file = store / WORK / STAGES
    if not file.is_file():
        raise UserError(f"{store} is not the output of a run: give the --out of `python -m data_prep`")
    stages = json.loads(file.read_text(encoding="utf-8"))
    running = is_locked(store / WORK)
    lines = [f"{'stage':<11}{'shards':>15}{'audio':>12}{'rejected':>9}{'rate':>12}{'left':>9}"]
    lines += [_line(store / WORK, stage, running) for stage in stages]
    if (store / "store.json").is_file():
        lines.append(f"the store is finished: {store}")
    elif running:
        lines.append("a run is active")
    else:
        lines.append("no run is active on this machine: run the same command again to continue")
    return "\n".join(lines)


def _line(root: Path, stage: dict[str, Any], running: bool) -> str:
    files = sorted((root / stage["folder"]).glob(f"[!.]*/{DONE}"))
    counts = [json.loads(file.read_text(encoding="utf-8"))["counts"] for file in files]
    end_times = [file.stat().st_mtime for file in files]
    seconds = sum(shard.get("seconds", 0.0) for shard in counts)
    rejected = sum(int(shard.get("rejected", 0)) for shard in counts)
    rate, left = "", ""
    if len(files) > 1:
        seconds_per_shard = (max(end_times) - min(end_times)) / (len(files) - 1)
        rate = f"{1 / max(seconds_per_shard, 1e-3):.2f}/s"
        remaining = seconds_per_shard * (stage["shards"] - len(files))
        left = tqdm.format_interval(remaining) if running and remaining else ""
    done = f"{len(files)}/{stage['shards']}"
    hours = f"{seconds / 3600:.2f} h" if seconds else ""
    return f"{stage['name']:<11}{done:>15}{hours:>12}{rejected:>9}{rate:>12}{left:>9}"
