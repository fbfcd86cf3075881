#!/bin/bash
# diffusers' DDIMScheduler does not arrive at its own next timestep unless the number of steps divides 1,000.
# A guess would be that each step goes to the next entry of scheduler.timesteps: it goes back by 1000 // steps instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler

print(f"diffusers {diffusers.__version__}, DDIMScheduler(timestep_spacing='trailing') with exact predictions of the noise (0)")
missed = {}
for steps in (20, 50, 16, 30):
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    levels = scheduler.alphas_cumprod.sqrt()  # a clean value of 1 without noise is this at each time
    x, worst = levels[scheduler.timesteps[0]].reshape(1), 0
    for now, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:]):
        x = scheduler.step(torch.zeros(1), now, x).prev_sample
        worst = max(worst, abs(int((levels - x).abs().argmin()) - int(following)))
        x = levels[following].reshape(1)
    missed[steps] = worst
    print(f"{steps} steps ({'divides' if 1000 % steps == 0 else 'does not divide'} 1,000): off by up to {worst} timesteps")
sys.exit(0 if missed[20] == missed[50] == 0 and missed[16] > 0 and missed[30] > 0 else 1)
PYTHON
