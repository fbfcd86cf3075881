"""Checks of a run's settings, the checkpoint that it resumes from, and its summary."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm import checkpoint
from ssmttm.config import RENAMED_SCHEDULE, flatten, load, new_key
from ssmttm.errors import UserError
from ssmttm.files import config_hash
from ssmttm.training.monitoring.profiler import parse_steps
from ssmttm.training.monitoring.trackers import check_trackers
from ssmttm.training.optim.schedule import learning_rate
from ssmttm.training.tasks.base import Batch, Loader, Task

# Keys that may change when a run is resumed: paths, logging, length, sampling.
RESUMABLE_KEYS = (
    "run_dir", "resume", "data.store", "data.text_encoder", "train.steps", "train.log_every", "train.eval_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.sample_every", "train.sample_seconds", "train.prompts",
    "train.micro_batch_size", "schedule.length", "train.recompute", "train.compile", "train.async_checkpoints",
    "train.skip_outliers", "train.skip_limit", "train.rollbacks", "train.rollback_lr", "train.stall_seconds",
    "train.profile", "train.trackers", "diffusion.sampler", "diffusion.steps",
    "diffusion.guidance_scale", "diffusion.coarse_guidance_scale",
)  # fmt: skip

MINIMUM_VALUES = {
    "data.batch_size": 1, "data.frames": 1, "data.seconds": 1e-3, "train.steps": 1, "train.minutes": 1e-3,
    "train.micro_batch_size": 1, "train.log_every": 0, "train.eval_every": 0, "train.eval_batches": 1,
    "train.checkpoint_every": 0, "train.skip_outliers": 1, "train.skip_limit": 1, "train.rollbacks": 0,
    "train.rollback_lr": 0, "train.stall_seconds": 0,
    "train.keep_checkpoints": 1, "train.sample_every": 0, "train.sample_seconds": 1e-3, "optim.lr": 0,
    "optim.weight_decay": 0, "optim.eps": 0, "optim.clip": 0, "optim.newton_schulz_steps": 1,
    "schedule.min_lr": 0, "schedule.warmup_steps": 0, "schedule.length": 1, "schedule.decay_steps": 1,
    "diffusion.coarse_noise_aug": 0, "codec_training.adversarial_start": 0, "codec_training.restart_every": 1,
    "codec_training.restart_until": 0, "seed": 0,
}  # fmt: skip
_UNMEASURED_STEPS = 2  # of a process: the first ones allocate memory and choose kernels
_MEASURED_STEPS, _MEASURED_SHARE = 8, 0.1  # steps, and share of train.minutes, before a timed run's length is decided
PROBABILITIES = (
    "data.caption_dropout", "data.tempo_dropout", "data.chroma_dropout", "data.key_dropout", "data.metre_dropout",
    "data.bar_position_dropout", "data.timing_dropout", "data.caption_swap", "diffusion.coarse_dropout",
    "train.label_smoothing", "train.ema_decay",
)  # fmt: skip


def check_settings(config: DictConfig) -> None:
    """Raises UserError for settings that no training can start with."""
    if not config.data.store:
        raise UserError(
            "data.store is not set: prepare one, such as `python -m data_prep builtin --hours 0.5 --out data/builtin`, "
            "and give data.store=data/builtin"
        )
    check_trackers(config.train.trackers)
    check_minimum(config, MINIMUM_VALUES | {f"losses.{name}": 0 for name in config.losses})
    for key in PROBABILITIES:
        value = OmegaConf.select(config, key)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{key} must be in [0, 1], got {value}")
    if config.train.minutes == math.inf:
        raise UserError("train.minutes must be a finite number: for a run without an end set train.steps high")
    if config.train.profile is not None:
        first, _ = parse_steps(config.train.profile)
        if config.train.minutes is None and first > config.train.steps:
            raise UserError(f"train.profile={config.train.profile} begins after the last step, {config.train.steps}")
    for name, values in config.data.items():
        for change in values if name.endswith("_schedule") else ():
            if len(change) != 2 or change[0] < 0 or change[1] < 1:
                raise UserError(f"data.{name} must list steps and sizes, as [[500,32]], got {list(change)} in it")
    if "momentum" in config.optim and not 0 <= config.optim.momentum < 1:
        raise UserError(f"optim.momentum must be in [0, 1), got {config.optim.momentum}")
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim.betas must be two numbers in [0, 1), got {list(betas)}")


def check_minimum(config: DictConfig, minimum: Mapping[str, float]) -> None:
    """Raises UserError unless each of these keys, where the task has it and it is not null, is at least its minimum."""
    for key, lowest in minimum.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= lowest:
            raise UserError(f"{key} must be at least {lowest}, got {value}")


def resume_folder(config: DictConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run. Raises UserError if `resume` or the settings do not fit."""
    run_dir = Path(config.run_dir)
    present = checkpoint.checkpoints(run_dir)
    if config.resume in (None, "none"):
        if present:
            raise UserError(f"{run_dir} holds {present[-1].name}: give another run_dir, or resume=auto to continue")
        return None
    if config.resume == "auto":
        folder = checkpoint.latest_good(run_dir)
        if folder is None and present:
            raise UserError(f"{run_dir} holds no good checkpoint: give another run_dir to start a new run")
    else:
        folder = Path(config.resume)
        checkpoint.verify(folder)
        if present and checkpoint.step_of(present[-1]) > checkpoint.step_of(folder):
            raise UserError(f"{run_dir} holds {present[-1].name}, later than {folder}: give another run_dir")
    if folder is not None:
        _check_same_settings(config, folder)
    return folder


def schedule_length(config: DictConfig, resumed: Path | None) -> tuple[int, str | None]:
    """The steps of the learning rate's schedule, and a warning if it is not the one that the user may expect.

    A run keeps the length with which it began, whatever train.steps is later, unless schedule.length changes it.
    """
    steps, wanted = config.train.steps, config.schedule.length
    if resumed is None:
        return wanted or steps, None
    state = checkpoint.read_state(resumed)
    stored = state.get("schedule_steps") or checkpoint.read_config(resumed).train.steps  # not in older checkpoints
    if config.train.minutes is None and steps < state["step"]:
        return stored, f"the run has {state['step']} steps already, train.steps={steps} leaves nothing to do"
    if wanted is not None and wanted != stored:
        before, after = (learning_rate(state["step"], length, config) for length in (stored, wanted))
        return wanted, (
            f"schedule.length={wanted} replaces the schedule of {stored} steps: after step {state['step']} the "
            f"learning rate goes on at {after:.2e} instead of {before:.2e}"
        )
    if wanted is not None or steps == stored or config.train.minutes is not None or config.schedule.kind == "constant":
        return stored, None
    end = learning_rate(steps - 1, stored, config)
    return stored, (
        f"the learning rate keeps the schedule of {stored} steps with which the run began, and ends at {end:.2e}: "
        f"set schedule.length={steps} to fit it to train.steps={steps}"
    )


class RunLength:
    """The number of steps of a run: `train.steps`, or as many as take `train.minutes` of training.

    With `train.minutes`, the number is estimated from the mean time of a step, anew after each one, until a tenth of
    the time and at least `_MEASURED_STEPS` are over. Then it is decided, and a resume keeps it. Validation, samples and
    checkpoints come on top of the time.

    Args:
        steps, minutes: `train.steps` and `train.minutes`.
        step, seconds: done when this process starts.
        decided: the number of steps that was decided before it started; 0: none.

    Attributes:
        steps: the number of steps, or its estimate.
        is_decided: whether it stays.
    """

    def __init__(self, steps: int, minutes: float | None, step: int, seconds: float, decided: int) -> None:
        self._budget, self._start = 60 * (minutes or 0.0), step
        self._times = [seconds]  # at the start and after each step
        self.steps = steps if minutes is None else decided or step + 1
        self.is_decided = minutes is None or decided > 0

    def update(self, seconds: float) -> None:
        """Estimate again after a step. `seconds`: of training since the run began."""
        self._times.append(seconds)
        done = len(self._times) - 1
        first = min(_UNMEASURED_STEPS, done - 1)
        per_step = (seconds - self._times[first]) / (done - first)
        left = max(0, math.floor((self._budget - seconds) / max(per_step, 1e-9)))
        self.steps = self._start + done + left
        measured = seconds - self._times[0] >= _MEASURED_SHARE * self._budget and done - first >= _MEASURED_STEPS
        self.is_decided = measured or not left


def _check_same_settings(config: DictConfig, folder: Path) -> None:
    old, new = _settings(checkpoint.read_config(folder)), _settings(config)
    if config.train.minutes is None:  # a run that was trained for a time may be continued by steps
        del new["train.minutes"]
    if new.keys() - old.keys():  # keys that are newer than the run
        old = flatten(load(f"task={config.task}")) | old
    changed = [key for key in sorted(new) if old.get(key) != new[key]]  # the old one may have keys of other tasks
    if changed:
        listed = "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed)
        raise UserError(f"the settings differ from {folder} ({listed}): restore them, or give another run_dir")


def _settings(config: DictConfig) -> dict[str, Any]:
    """The values by dotted key, without those that may change on resume."""
    values = {new_key(key, RENAMED_SCHEDULE) or key: value for key, value in flatten(config).items()}
    values = {"optim.kind": "adamw", "schedule.kind": "cosine"} | values  # of a run that began before there were others
    return {key: value for key, value in values.items() if key not in RESUMABLE_KEYS}


def settings_hash(config: DictConfig) -> str:
    """The hash of all settings but those that may change on resume."""
    return config_hash(_settings(config))


def run_summary(
    task: Task, config: DictConfig, length: RunLength, loader: Loader, micro: list[Batch], world_size: int, start: int
) -> str:
    """The console's lines at the start: parameters, steps, batch, totals. `micro`: micro-batches of the first step."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in task.modules.items()}
    throughputs = [task.throughput(batch, start) for batch in micro]
    tokens, seconds, flops = (sum(values) * world_size for values in zip(*throughputs, strict=True))
    steps, steps_per_epoch = max(start, length.steps), loader.steps_per_epoch
    remaining = steps - start
    epochs = f"{steps / steps_per_epoch:.1f} epochs of {steps_per_epoch:,} steps"
    lines = [
        f"parameters   {', '.join(f'{name} {size / 1e6:.2f} M' for name, size in sizes.items())}",
        f"steps        {start:,} to {steps:,}, {epochs}",
        f"batch        {config.data.batch_size} items = {world_size} ranks x {len(micro)} micro-batches; "
        f"{tokens:,.0f} codes, {seconds:,.1f} s of audio per step",
        f"remaining    {remaining * seconds / 3600:,.2f} h of audio, {remaining * tokens / 1e6:,.1f} M codes, "
        f"{3 * remaining * flops:.2e} FLOPs",
    ]
    if not length.is_decided:
        lines[1:] = [f"steps        as many as take {config.train.minutes:g} minutes, measured first", lines[2]]
    return "\n".join(lines)
