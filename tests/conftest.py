"""Settings of all tests."""

import os
from pathlib import Path

# Before torch is loaded, and for the programs that tests start: several tests run at a time.
for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

# The slowest files, which `make test` starts first, so that its processes end together.
SLOWEST = ("prep_kills", "readme", "sweep_kills", "sweeps", "sweep_launchers", "prep_ray", "lm_training", "training",
           "onnx", "protocol", "embedders", "prep_pipeline", "compression", "prep_slurm", "data_prep", "music_metrics",
           "distill", "resume", "controls")  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(Path(item.path).stem, len(ranks)))
