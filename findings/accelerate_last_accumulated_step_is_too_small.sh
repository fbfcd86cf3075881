#!/bin/bash
# accelerate's accumulate() steps at the end of the data even if the accumulation is not full, and still divides each
# loss by the whole number of steps: 6 batches in steps of 4 give a full gradient, then half of one.
# A guess would be that each gradient is the mean over the batches in it, or that the rest waits for the next epoch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import accelerate
import torch

print(f"accelerate {accelerate.__version__}, torch {torch.__version__}: each batch's gradient is 1, accumulation of 4 steps")
found = {}
for batches in (8, 6, 5):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.ones(batches, 1), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found[batches] = []
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            if accelerator.sync_gradients:
                found[batches].append(model.weight.grad.item())
            optimizer.step()
            optimizer.zero_grad()
    print(f"{batches} batches: the gradients of the optimizer's steps are {found[batches]}")
sys.exit(0 if found == {8: [1.0, 1.0], 6: [1.0, 0.5], 5: [1.0, 0.25]} else 1)
PYTHON
