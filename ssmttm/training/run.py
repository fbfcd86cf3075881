"""A run folder's bookkeeping: what it may go on from, what may change on the way, and the horizon printed at the start."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ssmttm import checkpoint
from ssmttm.errors import UserError
from ssmttm.training.task import Batch, Loader, Task

# What a resumed run may change without becoming another run: where things lie, how often it reports, how long it goes on.
FREE_KEYS = (
    "run_dir", "resume", "data.store", "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.sample_every", "train.prompts", "train.micro_batch_size",
)  # fmt: skip


def resume_folder(config: DictConfig) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; settles what `resume` asks with what `run_dir` holds.

    Raises:
        UserError: resume=none in a folder in use, a damaged checkpoint, or settings that differ from the checkpoint's.
    """
    run_dir = Path(config.run_dir)
    present = checkpoint.checkpoints(run_dir)
    if config.resume in (None, "none"):
        if present:
            raise UserError(
                f"{run_dir} already holds checkpoints: give another run_dir=..., or resume=auto to go on from {present[-1].name}"
            )
        return None
    if config.resume == "auto":
        folder = checkpoint.latest_good(run_dir)
        if folder is None and present:
            raise UserError(
                f"{run_dir} holds checkpoints, but none of them is good: give another run_dir=... to start anew"
            )
    else:
        folder = Path(config.resume)
        checkpoint.verify(folder)
        if present and checkpoint.step_of(present[-1]) > checkpoint.step_of(folder):
            raise UserError(
                f"{run_dir} holds later checkpoints than {folder} ({present[-1].name}): give another run_dir=... to branch off"
            )
    if folder is not None:
        _check_same_settings(config, folder)
    return folder


def _check_same_settings(config: DictConfig, folder: Path) -> None:
    old, new = _settings(OmegaConf.load(folder / "config.yaml")), _settings(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed)
        raise UserError(
            f"the settings differ from those of {folder} ({listed}): set them back, or start anew with another run_dir=..."
        )


def _settings(config: DictConfig) -> dict[str, Any]:
    """Every key that shapes the result, dotted."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix not in FREE_KEYS:
            flat[prefix] = node

    walk(OmegaConf.to_container(config, resolve=True), "")
    return flat


def config_hash(config: DictConfig) -> str:
    """16 hex digits over every setting that shapes the result."""
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()[:16]


def check_same_data(state: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    old, new = state["data"]["fingerprint"], facts["fingerprint"]
    if old != new:
        raise UserError(
            f"{folder} was trained on another store (fingerprint {old}, not {new}): give the store it was trained on as data.store=..."
        )


def versions() -> dict[str, str]:
    packages = ("torch", "numpy", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """A rank's share of the global batch in slices of at most `size` items."""
    items = len(batch["ids"])
    size = size or items
    return [
        {key: _rows(value, slice(start, start + size)) for key, value in batch.items()}
        for start in range(0, items, size)
    ]


def _rows(value: Any, rows: slice) -> Any:
    return type(value)(*(field[rows] for field in value)) if isinstance(value, tuple) else value[rows]


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) if hasattr(value, "to") else value for key, value in batch.items()}


def horizon(task: Task, config: DictConfig, loader: Loader, first: list[Batch], world_size: int, start: int) -> str:
    """What is about to be trained, and on how much: a few lines for the console."""
    players = ", ".join(
        f"{name} {sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6:.2f} M"
        for name, module in task.modules.items()
    )
    tokens, seconds, flops = (
        sum(figures) * world_size for figures in zip(*(task.work(batch) for batch in first), strict=True)
    )
    remaining = config.train.steps - start
    begins = f"from step {start:,} to {config.train.steps:,}" if start else f"{config.train.steps:,}"
    return "\n".join([
        f"parameters   {players}",
        f"steps        {begins}, {config.train.steps / loader.steps_per_epoch:.1f} epochs of {loader.steps_per_epoch:,} steps",
        f"batch        {config.data.batch_size} items = {world_size} ranks x {len(first)} micro-batches; {tokens:,.0f} codes, {seconds:,.1f} s of audio a step",
        f"to come      {remaining * seconds / 3600:,.2f} h of audio, {remaining * tokens / 1e6:,.1f} M codes, {3 * remaining * flops:.2e} FLOPs",
    ])  # fmt: skip
