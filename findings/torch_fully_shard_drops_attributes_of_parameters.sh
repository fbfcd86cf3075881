#!/bin/bash
# torch's fully_shard (FSDP2) puts new parameter objects into the module: an attribute that was set on a parameter, as
# people mark those without weight decay, is gone afterwards, without a warning.
# A guess would be that sharding keeps what hangs on a parameter, as DistributedDataParallel does, which keeps the objects.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 20000)) RANK=0 WORLD_SIZE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

init_process_group("gloo")


def marked():
    layer = nn.Linear(4, 4)
    layer.bias.no_weight_decay = True
    return layer


def marks(module):
    return [name for name, p in module.named_parameters() if getattr(p, "no_weight_decay", False)]


layer, replicated, sharded = marked(), DistributedDataParallel(marked()), marked()
fully_shard(sharded)
found = {"plain": marks(layer), "DistributedDataParallel": marks(replicated), "fully_shard": marks(sharded)}
destroy_process_group()
print(f"torch {torch.__version__}: parameters that are still marked: {found}")
sys.exit(0 if found == {"plain": ["bias"], "DistributedDataParallel": ["module.bias"], "fully_shard": []} else 1)
PYTHON
