"""Train a model: `python train.py experiment=NAME key=value ...`; on many devices `accelerate launch train.py ...`."""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from ssmttm import threads
from ssmttm.errors import run_cli

HELP = """\
Train a model from scratch, or resume a run.

  python train.py experiment=NAME [key=value ...]
  accelerate launch --config_file configs/accelerate/ddp8.yaml train.py experiment=NAME ...

experiments (configs/experiment/NAME.yaml):
{experiments}

examples:
  python train.py experiment=debug data.store=STORE                        a test run of a few seconds
  python train.py experiment=tiny data.store=STORE train.steps=500         a small language model
  python train.py experiment=tiny_codec data.store=STORE                   the codec
  python train.py experiment=tiny_stage1 data.store=STORE                  first of two stages: four codebooks
  python train.py experiment=tiny_stage2 data.store=STORE                  second stage: the other codebooks
  python train.py experiment=tinyttm_lm teacher=tiny_lm data.store=STORE   a small student of a large model
  python train.py experiment=tinyttm_codec data.store=STORE                a small decoder for the embedded codec
  python train.py experiment=lora init=tiny_lm data.store=STORE            an adapter for one's own music
  the same command again                                                   resumes from the newest good checkpoint

main keys (all keys by task: ssmttm/config/training.py; of the models: ssmttm/config/model.py):
  data.store=DIR            the store to train on, made by `python -m data_prep`
  data.batch_size=N         items per optimiser step, over all devices; train.micro_batch_size=N limits memory
  train.steps=N             optimiser steps; optim.lr=X learning rate; train.precision=auto|fp32|bf16
  optim=adamw|muon          schedule=cosine|linear|wsd|constant; train.recompute=selective|full saves memory
  train.eval_every=N        validation; train.checkpoint_every=N checkpoints; train.sample_every=N audio samples
  run_dir=DIR               checkpoints, metrics.jsonl, tensorboard, samples
  resume=auto|none|FOLDER   resume the run, require an empty folder, or start from a checkpoint

Ctrl-C (exit 130), SIGTERM and SIGUSR1 (exit 75) finish the step, write a checkpoint and stop.
"""


def main() -> int:
    arguments = sys.argv[1:]
    from ssmttm import config

    if not arguments or set(arguments) & {"-h", "--help"}:
        print(HELP.format(experiments="\n".join(f"  {name}" for name in config.names("experiment"))), end="")
        return 0
    settings = config.load(*arguments)
    from ssmttm.training.loop import train

    with threads.spin_when_alone():
        train(settings)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
