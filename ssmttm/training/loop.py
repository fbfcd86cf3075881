"""The training loop, the same sequence for every task and every number of devices.

Accelerate provides the device, the autocast and the gradient all-reduce only. Batches and the learning rate are pure
functions of the step; generator states and checkpoints are handled here. So a run that is stopped and resumed equals an
uninterrupted run (on a CPU bit for bit).
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig

from ssmttm.errors import Preempted, UserError
from ssmttm.files import directory_lock
from ssmttm.signals import INTERRUPT, stop_requests
from ssmttm.training import rng
from ssmttm.training.accelerator import Barrier, build_accelerator
from ssmttm.training.checkpointer import Progress, load_initial_weights, restore, save, step_folder
from ssmttm.training.data import no_captions_warning
from ssmttm.training.ema import EMA
from ssmttm.training.metrics import MetricsLog, Throughput, measured_peak, peak_flops, progress_line, validation_line
from ssmttm.training.optim import set_learning_rate
from ssmttm.training.run import RunLength, check_settings, resume_folder, run_summary, schedule_length
from ssmttm.training.optim.schedule import check_schedule, learning_rate
from ssmttm.training.step import (
    TrainedModule,
    accumulate,
    all_reduce_metrics,
    check_finite,
    clip_gradients,
    global_denominators,
    gradients,
    micro_batches,
    to_device,
    total_loss,
)
from ssmttm.training.tasks.base import Batch, Losses, Task

TASKS = {  # module of ssmttm.training.tasks and class, imported when used
    "lm": ("lm", "LanguageModelTask"),
    "diffusion": ("diffusion", "DiffusionTask"),
    "codec": ("codec", "CodecTask"),
    "distill": ("distill_lm", "DistillTask"),
    "distill_codec": ("distill_codec", "CodecDistillTask"),
    "distill_text": ("distill_text", "TextDistillTask"),
}


def train(config: DictConfig) -> Path:
    """Train `config.task` up to `config.train.steps`, or for `config.train.minutes`; returns the run folder.

    Raises:
        UserError: unusable settings, data or checkpoint; a loss that is not finite; a full disk.
        Preempted: SIGTERM or SIGUSR1 was received; a checkpoint is written.
        KeyboardInterrupt: Ctrl-C was received; a checkpoint is written.
    """
    check_settings(config)
    accelerator = build_accelerator(config.train.precision)
    with directory_lock(Path(config.run_dir), "training") if accelerator.is_main_process else contextlib.nullcontext():
        return _train(config, accelerator)


def _train(config: DictConfig, accelerator: Accelerator) -> Path:
    # --- task and modules ----------------------------------------------------------------------------------------
    rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    run_dir = Path(config.run_dir)
    barrier = Barrier(accelerator)
    resumed = resume_folder(config) if main else None
    barrier.wait()
    resumed = broadcast_object_list([resumed])[0]
    rng.seed_all(config.seed, rank=0)  # the same initial weights on every rank
    task = build_task(config)
    codec = None if config.task == "codec" else task.metadata()["codec"]
    new = config.init and not resumed
    init = load_initial_weights(config.init, task.modules["model"], codec) if new else {}
    trained_modules = {
        name: TrainedModule(name, module, config.optim, accelerator) for name, module in task.modules.items()
    }
    ema = EMA(trained_modules["model"].module, config.train.ema_decay) if config.train.ema_decay else None

    # --- new run or resume ---------------------------------------------------------------------------------------
    rng.seed_all(config.seed, rank)  # from here each rank draws its own dropout
    progress = restore(resumed, trained_modules, ema, task.metadata(), rank) if resumed else Progress(init=init)
    metadata = task.metadata()  # once the weights are loaded: a denoiser's include the statistics of its latents
    for module in trained_modules.values():
        module.wrap()
    for frozen in task.frozen:
        accelerator.prepare_model(frozen, evaluation_mode=True)  # in place
    progress.schedule_steps, warning = schedule_length(config, resumed)
    if config.train.minutes is None:
        check_schedule(config, progress.schedule_steps)
    length = RunLength(config.train.steps, config.train.minutes, progress.step, progress.seconds, progress.timed_steps)
    saved = resumed  # the last checkpoint
    log = MetricsLog(run_dir, config, progress.step) if main else None

    # --- data and summary ----------------------------------------------------------------------------------------
    loader = task.loader("train", config.data.batch_size, rank, world_size)
    valid = _validation_batches(task, config, accelerator) if config.train.eval_every else []
    peak, peak_source = peak_flops(accelerator.device, precision)
    if main:
        first = micro_batches(loader.batch(progress.step), config.train.micro_batch_size)
        print(run_summary(task, config, length, loader, first, world_size, progress.step))
        devices = f"{world_size} x {accelerator.device.type} {precision}"
        print(f"device       {devices}, peak {peak / 1e12:.3g} TFLOP/s each ({peak_source})")
        print(f"run folder   {run_dir}{f', resumed from {resumed.name}' if resumed else ''}", flush=True)
        for line in (warning, no_captions_warning(task.store, config.data.store, first[0])):
            if line:
                print(f"warning: {line}", file=sys.stderr, flush=True)
    throughput = Throughput(peak * world_size, lambda: world_size * measured_peak(accelerator.device, precision))

    # --- steps ---------------------------------------------------------------------------------------------------
    with stop_requests() as requested, contextlib.closing(loader.iterate(progress.step)) as batches:
        stop = interrupt = False
        while progress.step < length.steps and not stop:
            step_start = time.perf_counter()
            rates = {
                name: learning_rate(progress.step, progress.schedule_steps, config, name)
                for name in trained_modules
            }
            for name, module in trained_modules.items():
                for optimizer in module.optimizers.values():
                    set_learning_rate(optimizer, rates[name])
                module.module.train()
            micro = micro_batches(next(batches), config.train.micro_batch_size)
            losses, (tokens, seconds, flops) = gradients(task, trained_modules, micro, progress.step, accelerator)
            signal = requested()
            values, (stop, interrupt) = all_reduce_metrics(losses, accelerator, (bool(signal), signal == INTERRUPT))
            values |= clip_gradients(trained_modules, config.optim.clip)
            check_finite(progress.step + 1, values, saved)
            for module in trained_modules.values():
                module.update()
            reseeded = task.restart_codes(progress.step)
            trained_modules["model"].reset_moments(reseeded)
            values |= task.after_step(progress.step)
            progress.step += 1
            progress.samples_seen += config.data.batch_size
            if ema is not None:
                ema.reset_rows(reseeded)
                ema.update(progress.step)
            throughput.add(tokens * world_size, seconds * world_size, flops * world_size)
            progress.flops += flops * world_size
            progress.seconds += time.perf_counter() - step_start
            if not length.is_decided:
                length.update(broadcast_object_list([progress.seconds])[0])
                progress.schedule_steps = config.schedule.length or length.steps
                if length.is_decided:
                    progress.timed_steps = length.steps
                    if main:
                        print(f"steps        {length.steps:,} take {config.train.minutes:g} minutes", flush=True)
            steps = length.steps

            if log and _due(progress.step, steps, config.train.log_every):
                totals = {"samples": progress.samples_seen, "flops": progress.flops, "seconds": progress.seconds}
                values |= {"lr": rates["model"], **throughput.rates(), **totals}
                log.write(progress.step, values)
                print(progress_line(progress.step, steps, values), flush=True)
            pause_start = time.perf_counter()
            if valid and _due(progress.step, steps, config.train.eval_every):
                progress.valid = _validate(task, trained_modules, ema, valid, progress.step, accelerator)
                if log:
                    log.write(progress.step, progress.valid)
                    print(validation_line(progress.step, progress.valid), flush=True)
            if _due(progress.step, steps, config.train.sample_every):
                if log:
                    with torch.no_grad(), rng.isolated_rng(config.seed), _evaluating(trained_modules, ema):
                        for sample in task.samples(progress.step):
                            log.write_audio(progress.step, *sample)
                barrier.wait()
            if _due(progress.step, steps, config.train.checkpoint_every):
                saved = save(config, trained_modules, ema, progress, metadata, accelerator, barrier)
            throughput.pause(pause_start)

    # --- end -----------------------------------------------------------------------------------------------------
    if saved != step_folder(config, progress.step):  # stopped between two checkpoints
        save(config, trained_modules, ema, progress, metadata, accelerator, barrier)
    if log:
        log.close()
    accelerator.end_training()
    if stop and progress.step < length.steps:
        message = f"saved step {progress.step} of {length.steps} in {run_dir}: run the same command to continue"
        raise KeyboardInterrupt(message) if interrupt else Preempted(message)
    return run_dir


def build_task(config: DictConfig) -> Task:
    """The task named by `config.task`."""
    if config.task not in TASKS:
        raise UserError(f"unknown task={config.task}: choose from {', '.join(TASKS)}")
    module, name = TASKS[config.task]
    return getattr(import_module(f"ssmttm.training.tasks.{module}"), name)(config)


def _due(step: int, steps: int, every: int) -> bool:
    """Every `every` steps and at the last step; 0: never."""
    return bool(every) and (step % every == 0 or step == steps)


def _validation_batches(task: Task, config: DictConfig, accelerator: Accelerator) -> list[Batch]:
    """Micro-batches of the valid split, the same at every validation."""
    loader = task.loader("valid", config.data.batch_size, accelerator.process_index, accelerator.num_processes)
    count = min(config.train.eval_batches, loader.steps_per_epoch)
    return [micro for n in range(count) for micro in micro_batches(loader.batch(n), config.train.micro_batch_size)]


def _validate(
    task: Task,
    trained_modules: dict[str, TrainedModule],
    ema: EMA | None,
    batches: list[Batch],
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean losses over the validation batches with the averaged weights, named valid/..."""
    totals: Losses = {}
    denominators = global_denominators(task, batches, accelerator)
    modules = {name: module.module for name, module in trained_modules.items()}
    with torch.no_grad(), rng.isolated_rng(0), _evaluating(trained_modules, ema):
        for batch in batches:
            losses = task.validation(modules, to_device(batch, accelerator.device), denominators, step)
            accumulate(totals, {"loss": total_loss(losses, task.loss_weights), **losses})
    values, _ = all_reduce_metrics(totals, accelerator)
    return {f"valid/{name}": value for name, value in values.items()}


@contextlib.contextmanager
def _evaluating(trained_modules: dict[str, TrainedModule], ema: EMA | None) -> Iterator[None]:
    """Modules in eval mode, the model with its averaged weights."""
    with ema.average_weights() if ema is not None else contextlib.nullcontext():
        for module in trained_modules.values():
            module.module.eval()
        yield
