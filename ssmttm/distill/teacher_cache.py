"""Teacher logits cached on disk, so that several students or epochs query the teacher once.

A folder: `cache.json` with the settings that the logits depend on, and shards in safetensors. The loader must always
show the same crop of a segment (`data.fixed_crops`). Log-probabilities are float16: the rounding error is at most 0.004
above -16.
Shapes: K codebooks, S positions, k codes kept, n = k + 1, or V if all are kept.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.data.tensorfile import map_tensors, write_tensors
from ssmttm.distill.losses import SoftTarget
from ssmttm.errors import UserError
from ssmttm.files import write_text

_SHARD_SIZE = 64  # segments


def write_cache(out: Path, metadata: Mapping[str, Any], targets: Iterable[tuple[Sequence[str], SoftTarget]]) -> Path:
    """Write the soft targets of batches of segments, given by their ids; cache.json is written last."""
    if (out / "cache.json").exists():
        raise UserError(f"{out} holds a cache already: choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    pending: dict[str, SoftTarget] = {}
    shards: list[list[str]] = []

    def flush() -> None:
        arrays = {"log_p": np.stack([target.log_p.numpy().astype(np.float16) for target in pending.values()])}
        ids = [target.ids.numpy().astype(np.uint16) for target in pending.values() if target.ids is not None]
        if ids:
            arrays["ids"] = np.stack(ids)
        write_tensors(out / f"{len(shards):05d}.safetensors", arrays)
        shards.append(list(pending))
        pending.clear()

    for names, batch in targets:
        batch = batch.to(torch.device("cpu"))
        for row, name in enumerate(names):
            pending[name] = SoftTarget(batch.log_p[row], None if batch.ids is None else batch.ids[row])
        if len(pending) >= _SHARD_SIZE:
            flush()
    if pending:
        flush()
    write_text(out / "cache.json", json.dumps({"metadata": dict(metadata), "shards": shards}, indent=1) + "\n")
    return out


class TeacherLogitCache:
    """Reader of a cache.

    Args:
        metadata: the settings that the logits must have been made with.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any]) -> None:
        path = Path(path)
        try:
            index = json.loads((path / "cache.json").read_text())
            cached, shards = index["metadata"], index["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} holds no cache of teacher logits: write one with ssmttm cache-teacher") from error
        differing = [key for key in metadata if cached.get(key) != metadata[key]]
        if differing:
            listed = "; ".join(f"{key} {cached.get(key)}, not {metadata[key]}" for key in differing)
            raise UserError(f"the cache {path} was written for {listed}: write one with these settings")
        self._rows = {name: (shard, row) for shard, names in enumerate(shards) for row, name in enumerate(names)}
        self._shards = [map_tensors(path / f"{shard:05d}.safetensors") for shard in range(len(shards))]

    def __call__(self, ids: Sequence[str]) -> SoftTarget:
        """The soft targets of segments: log_p [b, K, S, n] float32 and ids [b, K, S, k]."""

        def gather(name: str) -> Tensor:
            return torch.from_numpy(np.stack([self._shards[shard][name][row] for shard, row in rows]))

        rows = [self._rows[name] for name in ids]
        return SoftTarget(gather("log_p").float(), gather("ids").long() if "ids" in self._shards[0] else None)
