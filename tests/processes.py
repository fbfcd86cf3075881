"""A training in two processes on the CPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmttm import config

ROOT = Path(__file__).parents[1]


def train_in_two_processes(settings: DictConfig, run_dir: Path, program: Sequence[str] = ("train.py",)) -> None:
    """Run the same training in another run folder, by train.py or another program."""
    settings = OmegaConf.merge(settings, {"run_dir": str(run_dir)})
    overrides = [f"{key}={'null' if value is None else value}" for key, value in flat(settings).items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--main_process_port", "0", *program, *base(settings), *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
    assert "2 x cpu" in result.stdout


def base(settings: DictConfig) -> list[str]:
    """The experiment and task that the overrides of a training start from."""
    return ["experiment=debug", f"task={settings.task}"]


def flat(settings: DictConfig) -> dict[str, object]:
    """The keys in which these settings differ from `base`, by dotted name."""
    defaults = config.load(*base(settings))
    different = {}

    def walk(node: DictConfig, other: DictConfig, prefix: str) -> None:
        for key in node:
            if OmegaConf.is_dict(node[key]):
                walk(node[key], other[key], f"{prefix}{key}.")
            elif node[key] != other[key]:
                different[f"{prefix}{key}"] = node[key]

    walk(settings, defaults, "")
    return different
