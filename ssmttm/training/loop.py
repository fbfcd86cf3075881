"""The training loop, the same sequence for every task and every number of devices.

Accelerate provides the device, the autocast and the gradient all-reduce only. Batches and the learning rate are pure
functions of the step; generator states and checkpoints are handled here. So a run that is stopped and resumed equals an
uninterrupted run (on a CPU bit for bit).
"""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig

from ssmttm.data.step_values import StepValues
from ssmttm.errors import Preempted, UserError
from ssmttm.files import directory_lock
from ssmttm.signals import INTERRUPT, stop_requests
from ssmttm.training import rng
from ssmttm.training.checkpointer import CheckpointWriter, Progress, load_initial_weights, restore
from ssmttm.training.data import no_captions_warning, short_segments_warning
from ssmttm.training.ema import EMA
from ssmttm.training.initial_model import with_model_of_init
from ssmttm.training.metrics import MetricsLog, Throughput, measured_peak, peak_flops, progress_line, validation_line
from ssmttm.training.monitoring.batches import Batches
from ssmttm.training.monitoring.profiler import StepProfiler
from ssmttm.training.monitoring.validation import evaluating, validate, validation_batches
from ssmttm.training.monitoring.watchdog import Watchdog
from ssmttm.training.optim.schedule import check_schedule, learning_rate, misfit
from ssmttm.training.optim.skip_step import SkipStep
from ssmttm.training.parallel.accelerator import build_accelerator, peak_memory
from ssmttm.training.parallel.ranks import Ranks
from ssmttm.training.parallel.sharding import build_sharding
from ssmttm.training.recompute import set_up_blocks
from ssmttm.training.run import RunLength, check_settings, resume_folder, run_summary, schedule_length
from ssmttm.training.step import (
    TrainedModule,
    all_reduce_losses,
    clip_gradients,
    gradients,
    micro_batches,
    to_numbers,
)
from ssmttm.training.tasks.base import Task

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
    config = with_model_of_init(config)
    check_settings(config)
    accelerator = build_accelerator(config.train.precision)
    main = accelerator.is_main_process
    with (
        directory_lock(Path(config.run_dir), "training") if main else contextlib.nullcontext(),
        Watchdog(accelerator.process_index, config.train.stall_seconds) as watchdog,
    ):
        return _train(config, accelerator, watchdog)


def _train(config: DictConfig, accelerator: Accelerator, watchdog: Watchdog) -> Path:
    # --- task and modules ----------------------------------------------------------------------------------------
    rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    run_dir = Path(config.run_dir)
    ranks = Ranks(accelerator, watchdog)
    resumed = resume_folder(config) if main else None
    ranks.wait()
    resumed = broadcast_object_list([resumed])[0]
    rng.seed_all(config.seed, rank=0)  # the same initial weights on every rank
    task = build_task(config)
    codec = None if config.task == "codec" else task.metadata()["codec"]
    new = config.init and not resumed
    init = load_initial_weights(config.init, task.modules["model"], codec) if new else {}
    task.add_adapter()
    sharding = build_sharding(config.task, task.modules, accelerator)
    trained_modules = {
        name: TrainedModule(name, module, config.optim, accelerator, sharding) for name, module in task.modules.items()
    }
    ema = EMA(trained_modules["model"].module, config.train.ema_decay) if config.train.ema_decay else None

    # --- new run or resume ---------------------------------------------------------------------------------------
    rng.seed_all(config.seed, rank)  # from here each rank draws its own dropout
    progress = restore(resumed, trained_modules, ema, task.metadata(), rank) if resumed else Progress(init=init)
    metadata = task.metadata()  # once the weights are loaded: a denoiser's include the statistics of its latents
    set_up_blocks(trained_modules["model"].module, config.train.recompute, config.train.compile)
    for module in trained_modules.values():
        module.wrap()
    for frozen in task.frozen:
        accelerator.prepare_model(frozen, evaluation_mode=True)  # in place
    progress.schedule_steps, warning = schedule_length(config, resumed)
    check_schedule(config, progress.schedule_steps if config.train.minutes is None else None)
    length = RunLength(config.train.steps, config.train.minutes, progress.step, progress.seconds, progress.timed_steps)
    skipping = SkipStep(accelerator.device, config.train.skip_outliers)
    if progress.skipping:
        skipping.load(progress.skipping)
    log = MetricsLog(run_dir, config, progress.step) if main else None

    # --- data and summary ----------------------------------------------------------------------------------------
    batch_size = StepValues(config.data.batch_size, config.data.batch_size_schedule)
    loader = task.loader("train", batch_size, rank, world_size)
    valid = validation_batches(task, config, accelerator) if config.train.eval_every else []
    peak, peak_source = peak_flops(accelerator.device, precision)
    if main:
        first = micro_batches(loader.batch(progress.step), config.train.micro_batch_size)
        print(run_summary(task, config, length, loader, first, world_size, progress.step))
        devices = f"{world_size} x {accelerator.device.type} {precision}"
        print(f"device       {devices}, peak {peak / 1e12:.3g} TFLOP/s each ({peak_source})")
        print(f"run folder   {run_dir}{f', resumed from {resumed.name}' if resumed else ''}", flush=True)
        no_captions = no_captions_warning(task.store, config.data.store, first[0])
        for line in (warning, no_captions, short_segments_warning(task.store, config.data.store, config)):
            if line:
                print(f"warning: {line}", file=sys.stderr, flush=True)
    throughput = Throughput(peak * world_size, lambda: world_size * measured_peak(accelerator.device, precision))
    profiler = StepProfiler(config.train.profile, run_dir, rank, accelerator.device)
    waits_for_device = accelerator.device.type == "cpu"
    skip_limit, rollbacks, rollback_lr = config.train.skip_limit, config.train.rollbacks, config.train.rollback_lr

    # --- steps ---------------------------------------------------------------------------------------------------
    with (
        stop_requests() as requested,
        contextlib.closing(Batches(loader, watchdog, progress.step + progress.left_out)) as batches,
        contextlib.closing(CheckpointWriter(config, accelerator, resumed, sharding is not None)) as writer,
        contextlib.closing(profiler),
    ):
        stop = interrupt = False
        saved_step = progress.step if resumed else None
        while progress.step < length.steps and not stop:
            step_start, waited = time.perf_counter(), batches.waited
            profiler.before_step(progress.step + 1)
            rates = {
                name: progress.lr_factor * learning_rate(progress.step, progress.schedule_steps, config, name)
                for name in trained_modules
            }
            for name, module in trained_modules.items():
                module.set_learning_rate(rates[name])
                module.module.train()
            micro = micro_batches(batches.next(), config.train.micro_batch_size)
            with watchdog.doing(f"in step {progress.step + 1}"):
                losses, (tokens, seconds, flops) = gradients(task, trained_modules, micro, progress.step, accelerator)
                signal = requested()
                values = all_reduce_losses(losses, accelerator) | clip_gradients(trained_modules, config.optim.clip)
                skip = skipping.check(values)
                for module in trained_modules.values():
                    module.update(skip)
                reseeded = task.restart_codes(progress.step)
                trained_modules["model"].reset_moments(reseeded)
                logged = values | task.after_step(progress.step)
                if ema is not None:
                    ema.reset_rows(reseeded)
                    ema.update(progress.step + 1)
                stop, interrupt = ranks.any([bool(signal), signal == INTERRUPT])
            progress.samples_seen += batch_size(progress.step)
            progress.step += 1
            log_is_due = _due(progress.step, length.steps, config.train.log_every)
            if waits_for_device or log_is_due or not length.is_decided:
                numbers, (skipped, in_a_row) = to_numbers(logged), skipping.counts()
            throughput.add(tokens * world_size, seconds * world_size, flops * world_size, batches.waited - waited)
            progress.flops += flops * world_size
            progress.seconds += time.perf_counter() - step_start
            profiler.after_step(progress.step)
            if not length.is_decided:
                length.update(broadcast_object_list([progress.seconds])[0])
                progress.schedule_steps = config.schedule.length or length.steps
                if length.is_decided:
                    progress.timed_steps = length.steps
                    if main:
                        print(f"steps        {length.steps:,} take {config.train.minutes:g} minutes", flush=True)
                        if problem := misfit(config, progress.schedule_steps):
                            print(f"warning: {problem}", file=sys.stderr, flush=True)
            steps = length.steps

            if (waits_for_device or log_is_due) and in_a_row >= skip_limit:
                writer.wait()
                saved = broadcast_object_list([writer.saved])[0]
                problem = _describe_skips(progress.step, in_a_row, numbers)
                if saved is None or progress.rollbacks >= rollbacks:
                    raise UserError(f"{problem}; {_advice(saved)}")
                failed = progress
                progress = restore(saved, trained_modules, ema, task.metadata(), rank)
                progress = replace(
                    progress,
                    schedule_steps=failed.schedule_steps,
                    timed_steps=failed.timed_steps,
                    rollbacks=failed.rollbacks + 1,
                    left_out=failed.left_out + failed.step - progress.step,
                    lr_factor=failed.lr_factor * rollback_lr,
                )
                skipping.start_again()
                batches.go_to(progress.step + progress.left_out)
                if log:
                    log.close()
                    log = MetricsLog(run_dir, config, progress.step)
                    print(f"warning: {problem}; rolled back to {saved.name}", file=sys.stderr, flush=True)
                continue

            if log and log_is_due:
                totals = {"samples": progress.samples_seen, "flops": progress.flops, "seconds": progress.seconds}
                memory = {"peak_memory_gib": peak_memory(accelerator.device), "skipped_steps": skipped}
                numbers |= {"lr": rates["model"], **throughput.rates(), **totals, **memory}
                log.write(progress.step, numbers)
                print(progress_line(progress.step, steps, numbers), flush=True)
            pause_start = time.perf_counter()
            if valid and _due(progress.step, steps, config.train.eval_every):
                with watchdog.doing("validating"):
                    progress.valid = validate(task, trained_modules, ema, valid, progress.step, accelerator)
                if log:
                    log.write(progress.step, progress.valid)
                    print(validation_line(progress.step, progress.valid), flush=True)
            if _due(progress.step, steps, config.train.sample_every):
                with evaluating(trained_modules, ema), trained_modules["model"].gathered():
                    if log:
                        with torch.no_grad(), rng.isolated_rng(config.seed):
                            for sample in task.samples(progress.step):
                                log.write_audio(progress.step, *sample)
                    ranks.wait()
            writer.poll()
            if _due(progress.step, steps, config.train.checkpoint_every):
                progress.skipping, saved_step = skipping.state(), progress.step
                writer.save(trained_modules, ema, progress, metadata)
            throughput.pause(pause_start)

        # --- end -------------------------------------------------------------------------------------------------
        if saved_step != progress.step:  # stopped between two checkpoints
            progress.skipping = skipping.state()
            writer.save(trained_modules, ema, progress, metadata)
        writer.wait(last=True)
    ranks.wait()
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


def _describe_skips(step: int, in_a_row: int, numbers: Mapping[str, float]) -> str:
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    found = f"{', '.join(bad)} is not a finite number" if bad else "the loss or gradient norm is far above recent ones"
    since = f", as in the {in_a_row - 1} steps before" if in_a_row > 1 else ""
    return f"step {step}: {found}{since}; the weights were not updated"


def _advice(saved: Path | None) -> str:
    if saved is None:
        return "no checkpoint was written yet: lower optim.lr or optim.clip and start again"
    return f"the last checkpoint is {saved}: lower optim.lr or optim.clip and start from it, with another run_dir"
