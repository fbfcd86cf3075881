"""The training loop: one fixed sequence for every task and every number of devices.

Accelerate gives the device, the autocast and the gradient all-reduce, and nothing else: batches are pure functions of the
step, the learning rate is a function of the step, generator states and checkpoints are our own. A run that stops at step n
and goes on is therefore the run that never stopped (on a CPU bit for bit).

Every loss is a share of a mean over the global batch (`Task.losses`), so neither the number of ranks nor that of
micro-batches changes what is computed. Gradients: DDP averages over ranks, hence the factor `world_size`.
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ssmttm import checkpoint
from ssmttm.errors import Preempted, UserError
from ssmttm.training import rng
from ssmttm.training.ema import EMA
from ssmttm.training.metrics import MetricsLog, Speed, peak_flops
from ssmttm.training.optim import build_optimizer, learning_rate, set_learning_rate
from ssmttm.training.run import (
    check_same_data,
    config_hash,
    horizon,
    micro_batches,
    resume_folder,
    to_device,
    versions,
)
from ssmttm.training.signals import INTERRUPT, stop_requests
from ssmttm.training.task import Batch, Task


@dataclass
class Progress:
    """The loop's whole state beside weights, optimisers and generators; plain data, kept in state.json."""

    step: int = 0  # optimiser steps done
    samples_seen: int = 0  # items, over all ranks
    seconds: float = 0.0  # of training, over all resumes
    valid: dict[str, float] = field(default_factory=dict)  # the last validation


class Player:
    """One trained module: itself, as Accelerate wrapped it, and its optimiser."""

    def __init__(self, module: nn.Module, config: DictConfig, accelerator: Accelerator) -> None:
        self.module = module.to(accelerator.device)
        self.optimizer = build_optimizer(self.module, config)
        self._accelerator = accelerator

    def wrap(self) -> None:
        self.wrapped = self._accelerator.prepare_model(self.module)


def train(config: DictConfig) -> Path:
    """Train `config.task` to `config.train.steps`, going on from a checkpoint as `config.resume` says.

    Returns:
        The run folder.

    Raises:
        UserError: settings, data or a checkpoint that cannot be used; a loss that is no number; a full disk.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint is written.
        KeyboardInterrupt: Ctrl-C came; a checkpoint is written.
    """
    # --- device, task, players -----------------------------------------------------------------------------------
    accelerator = _accelerator(config.train.precision)
    rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if config.data.batch_size % world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not split over {world_size} processes: choose a multiple of {world_size}"
        )
    run_dir = Path(config.run_dir)
    resumed = resume_folder(config)
    rng.seed_all(config.seed, rank=0)  # the same first weights on every rank
    task = build_task(config)
    players = {name: Player(module, config.optim, accelerator) for name, module in task.modules.items()}
    model = players["model"].module
    ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
    progress = Progress()

    # --- fresh start or resume -----------------------------------------------------------------------------------
    rng.seed_all(config.seed, rank)
    facts = task.facts()
    if resumed is not None:
        progress = _restore(resumed, players, ema, facts, rank)
    for player in players.values():
        player.wrap()
    if main:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml")
    log = MetricsLog(run_dir, progress.step) if main else None

    # --- data and horizon ----------------------------------------------------------------------------------------
    loader = task.loader("train", config.data.batch_size, rank, world_size)
    valid = _validation_batches(task, config, accelerator) if config.train.eval_every else []
    peak, peak_source = peak_flops(accelerator.device, _precision(accelerator))
    if main:
        first = micro_batches(loader.batch(progress.step), config.train.micro_batch_size)
        print(horizon(task, config, loader, first, world_size, progress.step))
        print(
            f"device       {world_size} x {accelerator.device.type}, {_precision(accelerator)}, peak {peak / 1e12:.3g} TFLOP/s each ({peak_source})"
        )
        print(f"run folder   {run_dir}" + (f", going on from {resumed}" if resumed else ""), flush=True)
    speed = Speed(peak * world_size)
    last_saved = progress.step if resumed is not None and resumed.parent == run_dir / "checkpoints" else None

    def save() -> None:
        nonlocal last_saved
        if last_saved != progress.step:
            _save(run_dir, config, players, ema, progress, facts, accelerator)
            last_saved = progress.step

    # --- steps ---------------------------------------------------------------------------------------------------
    with stop_requests() as requested, contextlib.closing(loader.iterate(progress.step)) as batches:
        while progress.step < config.train.steps:
            begun = time.perf_counter()
            rate = learning_rate(progress.step, config.train.steps, config.optim)
            for player in players.values():
                set_learning_rate(player.optimizer, rate)
                player.module.train()
            micro = micro_batches(next(batches), config.train.micro_batch_size)
            losses, work = _gradients(task, players, micro, progress.step, accelerator)
            values = _agree(losses, requested(), accelerator)
            stop = values.pop("stop")
            norms = _clip(players, config.optim.clip)
            _check_finite(progress.step + 1, values, norms, run_dir)
            for player in players.values():
                if any(p.grad is not None for p in player.module.parameters()):
                    player.optimizer.step()
                    player.optimizer.zero_grad(set_to_none=True)
            values |= task.after_step(progress.step)
            progress.step += 1
            progress.samples_seen += config.data.batch_size
            if ema is not None:
                ema.update(progress.step)
            speed.add(*(figure * world_size for figure in work))
            progress.seconds += time.perf_counter() - begun

            if log and (progress.step % config.train.log_every == 0 or progress.step == config.train.steps):
                values |= {"lr": rate, **norms, **speed.rates(), "seconds": progress.seconds}
                log.write(progress.step, values)
                print(_line(progress.step, config.train.steps, values), flush=True)
            pause = time.perf_counter()
            if valid and (progress.step % config.train.eval_every == 0 or progress.step == config.train.steps):
                progress.valid = _validate(task, players, ema, valid, progress.step, accelerator)
                if log:
                    log.write(progress.step, progress.valid)
                    print(_valid_line(progress.step, progress.valid), flush=True)
            if (
                log
                and config.train.sample_every
                and (progress.step % config.train.sample_every == 0 or progress.step == config.train.steps)
            ):
                with rng.fenced(config.seed), torch.no_grad(), _evaluating(players, ema):
                    for sample in task.samples(progress.step):
                        log.write_audio(progress.step, *sample)
            if progress.step % config.train.checkpoint_every == 0 or progress.step == config.train.steps:
                save()
            speed.pause(pause)
            if stop and progress.step < config.train.steps:
                save()
                where = (
                    f"step {progress.step} of {config.train.steps} is kept in {run_dir}: run the same command to go on"
                )
                raise KeyboardInterrupt(where) if stop >= INTERRUPT_CODE else Preempted(where)

    save()
    if log:
        log.close()
    accelerator.end_training()
    return run_dir


def build_task(config: DictConfig) -> Task:
    """The task named by `config.task`."""
    if config.task == "lm":
        from ssmttm.training.lm import LanguageModelTask

        return LanguageModelTask(config)
    if config.task == "codec":
        from ssmttm.training.codec import CodecTask

        return CodecTask(config)
    raise UserError(f"task={config.task} is unknown: there are lm and codec")


def _accelerator(precision: str) -> Accelerator:
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"train.precision={precision} is unknown: there are auto, fp32 and bf16")
    capable = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and torch.cuda.is_available() and not capable:
        raise UserError("train.precision=bf16: this GPU has no bf16, use fp32")
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and capable) else "no"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=mixed, kwargs_handlers=[ddp])


def _precision(accelerator: Accelerator) -> str:
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def _gradients(
    task: Task, players: dict[str, Player], micro: list[Batch], step: int, accelerator: Accelerator
) -> tuple[dict[str, Tensor], tuple[float, float, float]]:
    """Forward and backward over a rank's micro-batches: (this rank's share of each loss, its work as `Task.work`, x3)."""
    counts = _global_counts(task, micro, accelerator)
    wrapped = {name: player.wrapped for name, player in players.items()}
    totals: dict[str, Tensor] = {}
    tokens = seconds = flops = 0.0
    for index, batch in enumerate(micro):
        figures = task.work(batch)
        tokens, seconds, flops = tokens + figures[0], seconds + figures[1], flops + 3 * figures[2]
        with contextlib.ExitStack() as stack:
            if index < len(micro) - 1:
                for module in wrapped.values():
                    stack.enter_context(accelerator.no_sync(module))
            with accelerator.autocast():
                by_player = task.losses(wrapped, to_device(batch, accelerator.device), counts, step)
            for name, losses in by_player.items():
                objective = sum(
                    task.loss_weights[key] * loss for key, loss in losses.items() if key in task.loss_weights
                )
                (objective * accelerator.num_processes).backward()
                title = "loss" if name == "model" else f"{name}_loss"
                for key, loss in {title: objective, **losses}.items():
                    totals[key] = totals.get(key, 0.0) + loss.detach().float()
    return totals, (tokens, seconds, flops)


def _global_counts(task: Task, micro: list[Batch], accelerator: Accelerator) -> Tensor:
    counts = torch.stack([task.counts(batch) for batch in micro]).sum(0).to(accelerator.device)
    return accelerator.reduce(counts, "sum")


INTERRUPT_CODE = 1_000_000


def _agree(losses: dict[str, Tensor], signal_number: int, accelerator: Accelerator) -> dict[str, float]:
    """Losses of the global batch, the same on every rank, and in "stop" whether any rank was told to stop."""
    told = 0 if not signal_number else INTERRUPT_CODE if signal_number == INTERRUPT else 1
    shares = torch.stack([*losses.values(), torch.tensor(float(told), device=accelerator.device)])
    return dict(zip([*losses, "stop"], accelerator.reduce(shares, "sum").tolist(), strict=True))


def _clip(players: dict[str, Player], clip: float | None) -> dict[str, float]:
    """Clip each player's gradient to the norm `clip` (null: only measure); the norms before it, by name to log."""
    norms = {}
    for name, player in players.items():
        if any(p.grad is not None for p in player.module.parameters()):
            norm = nn.utils.clip_grad_norm_(player.module.parameters(), clip or math.inf)
            norms["grad_norm" if name == "model" else f"{name}_grad_norm"] = float(norm)
    return norms


def _check_finite(step: int, values: dict[str, float], norms: dict[str, float], run_dir: Path) -> None:
    broken = [name for name, value in (values | norms).items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"step {step}: {', '.join(broken)} is not a finite number, stopped before the weights changed: "
            f"lower optim.lr or optim.clip; the checkpoints in {run_dir} are good"
        )


def _validation_batches(task: Task, config: DictConfig, accelerator: Accelerator) -> list[Batch]:
    """The same fixed micro-batches of the valid split at every validation."""
    loader = task.loader("valid", config.data.batch_size, accelerator.process_index, accelerator.num_processes)
    count = min(config.train.eval_batches, loader.steps_per_epoch)
    return [micro for n in range(count) for micro in micro_batches(loader.batch(n), config.train.micro_batch_size)]


@contextlib.contextmanager
def _evaluating(players: dict[str, Player], ema: EMA | None):
    """Modules in eval mode, the model with its averaged weights."""
    with ema.swapped_in() if ema is not None else contextlib.nullcontext():
        for player in players.values():
            player.module.eval()
        yield


def _validate(
    task: Task, players: dict[str, Player], ema: EMA | None, batches: list[Batch], step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean losses over the fixed validation batches, of the averaged weights, named valid/..."""
    totals: dict[str, Tensor] = {}
    counts = _global_counts(task, batches, accelerator)
    modules = {name: player.module for name, player in players.items()}
    with torch.no_grad(), rng.fenced(0), _evaluating(players, ema), accelerator.autocast():
        for batch in batches:
            losses = task.validation(modules, to_device(batch, accelerator.device), counts, step)
            objective = sum(task.loss_weights[key] * loss for key, loss in losses.items() if key in task.loss_weights)
            for key, loss in {"loss": objective, **losses}.items():
                totals[key] = totals.get(key, 0.0) + loss.float()
    values = _agree(totals, 0, accelerator)
    return {f"valid/{name}": value for name, value in values.items() if name != "stop"}


def _save(
    run_dir: Path, config: DictConfig, players: dict[str, Player], ema: EMA | None, progress: Progress, facts: dict[str, Any],
    accelerator: Accelerator,
) -> None:  # fmt: skip
    states = [json.loads(state) for state in gather_object([json.dumps(rng.get_state())])]
    if accelerator.is_main_process:
        checkpoint.save_checkpoint(
            run_dir / "checkpoints" / f"step-{progress.step:08d}",
            config=config,
            weights={name: player.module.state_dict() for name, player in players.items()},
            ema=ema.state_dict() if ema is not None else None,
            optimizers={name: player.optimizer.state_dict() for name, player in players.items()},
            rng=states,
            state={
                **vars(progress), "world_size": accelerator.num_processes, "config_hash": config_hash(config),
                "data": facts, "versions": versions(),
            },
        )  # fmt: skip
        checkpoint.prune(run_dir, config.train.keep_checkpoints)
    accelerator.wait_for_everyone()


def _restore(folder: Path, players: dict[str, Player], ema: EMA | None, facts: dict[str, Any], rank: int) -> Progress:
    state = checkpoint.read_state(folder)
    check_same_data(state, facts, folder)
    optimizers = checkpoint.read_optimizers(folder)
    for name, player in players.items():
        player.module.load_state_dict(checkpoint.load_weights(folder, ema=False, player=name))
        player.optimizer.load_state_dict(optimizers[name])
    if ema is not None:
        ema.load_state_dict(checkpoint.load_weights(folder))
    states = checkpoint.read_rng(folder)
    if rank < len(states):
        rng.set_state(states[rank])
    else:
        print(f"rank {rank} is new since {folder}: its dropout starts from the seed and the step", flush=True)
        rng.seed_all(state["step"], rank)
    return Progress(**{key: state[key] for key in ("step", "samples_seen", "seconds", "valid")})


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    eta = (steps - step) * values["seconds_per_step"]
    others = " ".join(f"{key} {values[key]:.3f}" for key in ("discriminator_loss",) if key in values)
    return (
        f"step {step:>6}/{steps} | loss {values['loss']:.4f} {others}| lr {values['lr']:.2e} | grad {values['grad_norm']:.2f} | "
        f"{values['tokens_per_second']:,.0f} tokens/s | {values['audio_seconds_per_second']:.1f} audio-s/s | "
        f"MFU {100 * values['mfu']:.1f} % | ETA {int(eta // 3600)}:{int(eta % 3600 // 60):02d}:{int(eta % 60):02d}"
    )


def _valid_line(step: int, values: dict[str, float]) -> str:
    return f"step {step:>6} valid | " + " ".join(
        f"{name.removeprefix('valid/')} {value:.4f}" for name, value in values.items()
    )
