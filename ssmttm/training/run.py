"""A run folder's bookkeeping: what it may go on from, what may change on the way, what the console says."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm import checkpoint
from ssmttm.errors import UserError
from ssmttm.training.tasks.base import Batch, Loader, Task

# What may change without making it another run: where things lie, how often it reports, how long it goes on.
RESUMABLE_KEYS = (
    "run_dir", "resume", "data.store", "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.sample_every", "train.sample_seconds", "train.prompts", "train.micro_batch_size",
    "diffusion.sampler", "diffusion.steps", "diffusion.guidance_scale", "diffusion.coarse_guidance_scale",
)  # fmt: skip


# The least value of each number that a wrong override could spoil.
MINIMUM_VALUES = {
    "data.batch_size": 1, "data.frames": 1, "data.seconds": 1e-3, "train.steps": 1, "train.log_every": 0,
    "train.eval_every": 0, "train.eval_batches": 1, "train.checkpoint_every": 0, "train.keep_checkpoints": 1,
    "train.sample_every": 0, "optim.lr": 0, "optim.min_lr": 0, "optim.warmup_steps": 0, "optim.weight_decay": 0,
    "seed": 0,
}  # fmt: skip
PROBABILITIES = ("data.caption_dropout", "data.tempo_dropout", "data.chroma_dropout")


def check_settings(config: DictConfig) -> None:
    """Refuse settings that no training can start from.

    Raises:
        UserError: there is no store, a number is none or too small, or a chance is none.
    """
    if not config.data.store:
        raise UserError(
            "data.store is not set: make one, such as `python -m data_prep builtin --hours 0.5 --out data/builtin`, "
            "and give data.store=data/builtin"
        )
    check_least(config, MINIMUM_VALUES)
    for key in PROBABILITIES:
        value = OmegaConf.select(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise UserError(f"{key}={value} is no chance: give 0 to 1")


def check_least(config: DictConfig, least: Mapping[str, float]) -> None:
    """Raises UserError unless each of these settings is a number of at least so much."""
    for key, lowest in least.items():
        value = OmegaConf.select(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= lowest:
            raise UserError(f"{key}={value} is no number of at least {lowest}: change it")


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
                f"{run_dir} holds {present[-1].name}: give another run_dir, or resume=auto to go on from it"
            )
        return None
    if config.resume == "auto":
        folder = checkpoint.latest_good(run_dir)
        if folder is None and present:
            raise UserError(f"{run_dir} holds checkpoints, but no good one: give another run_dir to start anew")
    else:
        folder = Path(config.resume)
        checkpoint.verify(folder)
        if present and checkpoint.step_of(present[-1]) > checkpoint.step_of(folder):
            raise UserError(
                f"{run_dir} holds {present[-1].name}, later than {folder}: give another run_dir to branch off"
            )
    if folder is not None:
        _check_same_settings(config, folder)
    return folder


def _check_same_settings(config: DictConfig, folder: Path) -> None:
    old, new = _settings(OmegaConf.load(folder / "config.yaml")), _settings(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed)
        raise UserError(f"the settings are not those of {folder} ({listed}): set them back, or give another run_dir")


def _settings(config: DictConfig) -> dict[str, Any]:
    """Every key that shapes the result, dotted."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix not in RESUMABLE_KEYS:
            flat[prefix] = node

    walk(OmegaConf.to_container(config, resolve=True), "")
    return flat


def config_hash(config: DictConfig) -> str:
    """16 hex digits over every setting that shapes the result."""
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()[:16]


def run_summary(task: Task, config: DictConfig, loader: Loader, first: list[Batch], world_size: int, start: int) -> str:
    """What is about to be trained, and on how much: a few lines for the console."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in task.modules.items()}
    tokens, seconds, flops = (
        sum(metrics) * world_size for metrics in zip(*(task.work(batch, start) for batch in first), strict=True)
    )
    steps, epoch = config.train.steps, loader.steps_per_epoch
    to_come = steps - start
    return "\n".join([
        f"parameters   {', '.join(f'{name} {size / 1e6:.2f} M' for name, size in sizes.items())}",
        f"steps        {start:,} to {steps:,}, {steps / epoch:.1f} epochs of {epoch:,} steps",
        f"batch        {config.data.batch_size} items = {world_size} ranks x {len(first)} micro-batches; "
        f"{tokens:,.0f} codes, {seconds:,.1f} s of audio a step",
        f"to come      {to_come * seconds / 3600:,.2f} h of audio, {to_come * tokens / 1e6:,.1f} M codes, "
        f"{3 * to_come * flops:.2e} FLOPs",
    ])  # fmt: skip


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One line for the console from the values of a log interval."""
    eta = int((steps - step) * values["seconds_per_step"])
    others = "".join(f" | {key} {values[key]:.3f}" for key in values if key.endswith("_loss"))
    return (
        f"step {step:>{len(str(steps))}}/{steps} | loss {values['loss']:.4f}{others} | lr {values['lr']:.2e} | "
        f"grad {values['grad_norm']:.2f} | {values['tokens_per_second']:,.0f} tokens/s | "
        f"{values['audio_seconds_per_second']:.1f} audio-s/s | MFU {100 * values['mfu']:.1f} % | "
        f"ETA {eta // 3600}:{eta % 3600 // 60:02d}:{eta % 60:02d}"
    )


def validation_line(step: int, values: dict[str, float]) -> str:
    """One line for the console from the figures of a validation."""
    named = (f"{name.removeprefix('valid/')} {value:.4f}" for name, value in values.items())
    return f"step {step} valid | {' | '.join(named)}"
