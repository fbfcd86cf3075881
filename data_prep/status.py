"""How far a run is: read from its folder alone, while it works or after it stopped."""

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
    """A table of stages: shards done, sound, what was refused, the rate and the time left; and whether a run is on.

    Raises:
        UserError: nothing was prepared in this folder.
    """
    file = store / WORK / STAGES
    if not file.is_file():
        raise UserError(f"nothing was prepared in {store}: name the --out of a `python -m data_prep` run")
    stages = json.loads(file.read_text(encoding="utf-8"))
    running = is_locked(store / WORK)
    lines = [f"{'stage':<11}{'shards':>15}{'sound':>12}{'rejected':>9}{'rate':>12}{'left':>9}"]
    lines += [_line(store / WORK, stage, running) for stage in stages]
    if (store / "store.json").is_file():
        lines.append(f"the store is finished: {store}")
    elif running:
        lines.append("a run is working on it")
    else:
        lines.append("no run is working on it here: give the same command again to go on")
    return "\n".join(lines)


def _line(root: Path, stage: dict[str, Any], running: bool) -> str:
    shards = [_read(path) for path in sorted((root / stage["folder"]).glob(f"[!.]*/{DONE}"))]
    seconds = sum(shard["counts"].get("seconds", 0.0) for shard in shards)
    rejected = sum(int(shard["counts"].get("rejected", 0)) for shard in shards)
    rate, left = "", ""
    if len(shards) > 1:
        first, last = min(shard["ended"] for shard in shards), max(shard["ended"] for shard in shards)
        a_shard = (last - first) / (len(shards) - 1)
        rate = f"{1 / max(a_shard, 1e-3):.2f}/s"
        remaining = a_shard * (stage["shards"] - len(shards))
        left = tqdm.format_interval(remaining) if running and remaining else ""
    done = f"{len(shards)}/{stage['shards']}"
    sound = f"{seconds / 3600:.2f} h" if seconds else ""
    return f"{stage['name']:<11}{done:>15}{sound:>12}{rejected:>9}{rate:>12}{left:>9}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) | {"ended": path.stat().st_mtime}
