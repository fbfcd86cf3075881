#!/bin/bash
# accelerate launch with `distributed_type: FSDP` and `use_cpu: true` starts all processes, and in each of them Accelerator()
# takes itself for the only one: the model is not wrapped, and the processes would train apart, without a warning.
# A guess would be that FSDP2, which torch runs on a CPU with gloo, is used, or that the config is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cat > "$folder/show.py" <<'PYTHON'
import os

import accelerate
import torch

accelerator = accelerate.Accelerator()
model = accelerator.prepare(torch.nn.Linear(4, 4))
kind, state = type(model).__name__, accelerator.state
print(f"{os.environ['WORLD_SIZE']} processes started, num_processes {state.num_processes}, model {kind}", flush=True)
PYTHON
cd "$folder"
printf '%s\n' "compute_environment: LOCAL_MACHINE" "distributed_type: FSDP" "use_cpu: true" "num_machines: 1" \
  "num_processes: 2" 'mixed_precision: "no"' "fsdp_config:" "  fsdp_version: 2" \
  "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP" "  fsdp_transformer_layer_cls_to_wrap: Linear" > fsdp.yaml
OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH" accelerate launch --config_file fsdp.yaml \
  --main_process_port $((20000 + RANDOM % 20000)) show.py > out.txt 2> err.txt || { cat err.txt; exit 1; }
echo "accelerate 1.15.0: $(sort out.txt)"
[ "$(sort -u out.txt)" = "2 processes started, num_processes 1, model Linear" ]
