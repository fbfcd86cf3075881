"""A teacher's answers kept on disk, so that many students, or many epochs, ask it once.

A folder: `cache.json`, what the answers depend on, and shards of safetensors, a segment after the other. The loader
must show each segment in one way only, `data.fixed_crops`. Log-probabilities are float16, which rounds those above -16
by 0.004 at the most.
Shapes: K codebooks, S positions, k codes kept, n = k + 1, or V where all are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.data.tensorfile import map_tensors, write_tensors
from ssmttm.distill.losses import Target
from ssmttm.errors import UserError
from ssmttm.files import write_text

_SHARD = 64  # segments


def write_cache(out: Path, facts: Mapping[str, Any], answers: Iterable[tuple[Sequence[str], Target]]) -> Path:
    """Write the answers for batches of segments, named by id; cache.json comes last.

    Raises:
        UserError: the folder holds a cache already.
    """
    if (out / "cache.json").exists():
        raise UserError(f"{out} holds a cache already: give another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    held: dict[str, Target] = {}
    shards: list[list[str]] = []

    def put() -> None:
        arrays = {"log_p": np.stack([t.log_p.numpy().astype(np.float16) for t in held.values()])}
        if all(target.ids is not None for target in held.values()):
            arrays["ids"] = np.stack([t.ids.numpy().astype(np.uint16) for t in held.values()])
        write_tensors(out / f"{len(shards):05d}.safetensors", arrays)
        shards.append(list(held))
        held.clear()

    for ids, target in answers:
        for row, name in enumerate(ids):
            held[name] = Target(*(None if part is None else part[row].cpu() for part in target))
        if len(held) >= _SHARD:
            put()
    if held:
        put()
    write_text(out / "cache.json", json.dumps({"facts": dict(facts), "shards": shards}, indent=1) + "\n")
    return out


class TeacherLogitCache:
    """What `write_cache` wrote.

    Args:
        facts: what the answers are to depend on.

    Raises:
        UserError: there is no cache, or it depends on other things (named).
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any]) -> None:
        path = Path(path)
        try:
            held = json.loads((path / "cache.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} holds no cache of a teacher: write one with ssmttm cache-teacher") from error
        differing = [key for key in facts if held["facts"].get(key) != facts[key]]
        if differing:
            listed = "; ".join(f"{key} {held['facts'].get(key)}, not {facts[key]}" for key in differing)
            raise UserError(f"the cache {path} was written for {listed}: write one with these settings")
        self._place = {n: (i, row) for i, names in enumerate(held["shards"]) for row, n in enumerate(names)}
        self._shards = [map_tensors(path / f"{i:05d}.safetensors") for i in range(len(held["shards"]))]

    def __call__(self, ids: Sequence[str]) -> Target:
        """Answers for segments: log_p [b, K, S, n] float32 and ids [b, K, S, k]."""
        places = [self._place[name] for name in ids]

        def gathered(part: str) -> Tensor:
            return torch.from_numpy(np.stack([self._shards[shard][part][row] for shard, row in places]))

        log_p = gathered("log_p").float()
        return Target(log_p, gathered("ids").long() if "ids" in self._shards[0] else None)
