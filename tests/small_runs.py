"""Helpers for tests of training runs: metrics, interrupted runs, comparison of two runs."""

import json
import os
import signal

import pytest
import torch

from ssmttm import checkpoint
from ssmttm.errors import Preempted
from ssmttm.training import loop

TAGS = ("losses.tags=1", "tag_head.block=1")


def metric_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [row["loss"] for row in metric_rows(run_dir) if "loss" in row]


def weights(run_dir, ema=False):
    return checkpoint.load_weights(checkpoint.latest_good(run_dir), ema=ema)


def train_with_stops(config, task_class, stops, monkeypatch):
    """Train to the end; SIGTERM interrupts the run after each of the steps `stops`, and it is resumed."""
    original = task_class.after_step

    def after_step(self, step):
        if step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(task_class, "after_step", after_step)
        for _ in stops:
            with pytest.raises(Preempted):
                loop.train(config)
        loop.train(config)


def run_contents(run_dir):
    """All tensors, generator states and progress of the newest checkpoint, and the losses of every step."""
    folder = checkpoint.latest_good(run_dir)
    tensors = {
        path.stem: {name: value.clone() for name, value in checkpoint.read_tensors(folder, path.stem).items()}
        for path in folder.glob("*.safetensors")
    }
    state = {key: checkpoint.read_state(folder)[key] for key in ("step", "samples_seen", "flops", "valid")}
    curve = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in metric_rows(run_dir) if "loss" in row]
    return tensors, checkpoint.read_document(folder, "rng"), state, curve


def assert_same_runs(first, second):
    """Two `run_contents` are equal, bit for bit."""
    (files, *documents), (other_files, *other_documents) = first, second
    assert files.keys() == other_files.keys()
    for name, tensors in files.items():
        assert tensors.keys() == other_files[name].keys()
        differing = [key for key, value in tensors.items() if not torch.equal(value, other_files[name][key])]
        assert not differing, f"{name}: {differing}"
    assert documents == other_documents
