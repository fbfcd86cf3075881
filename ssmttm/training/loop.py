"""The training loop: one fixed sequence for every task and every number of devices.

Accelerate gives the device, the autocast and the gradient all-reduce, and nothing else: batches are pure functions of
the step, the learning rate is a function of the step, generator states and checkpoints are our own. So a run that stops
at step n and goes on is the run that never stopped (on a CPU bit for bit).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig

from ssmttm.errors import Preempted, UserError
from ssmttm.files import directory_lock
from ssmttm.signals import INTERRUPT, stop_requests
from ssmttm.training import rng
from ssmttm.training.accelerator import build_accelerator
from ssmttm.training.checkpointer import Progress, restore, save, start_from
from ssmttm.training.ema import EMA
from ssmttm.training.metrics import MetricsLog, Speed, peak_flops
from ssmttm.training.optim import learning_rate, set_learning_rate
from ssmttm.training.run import check_settings, progress_line, resume_folder, run_summary, validation_line
from ssmttm.training.step import (
    TrainedModule,
    add,
    all_reduce_metrics,
    check_finite,
    clip_gradients,
    global_denominators,
    gradients,
    micro_batches,
    objective,
    to_device,
)
from ssmttm.training.tasks.base import Batch, Losses, Task


def train(config: DictConfig) -> Path:
    """Train `config.task` to `config.train.steps`, going on from a checkpoint as `config.resume` says.

    Returns:
        The run folder.

    Raises:
        UserError: settings, data or a checkpoint that cannot be used; a loss that is no number; a full disk.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint is written.
        KeyboardInterrupt: Ctrl-C came; a checkpoint is written.
    """
    check_settings(config)
    accelerator = build_accelerator(config.train.precision)
    with directory_lock(Path(config.run_dir), "training") if accelerator.is_main_process else contextlib.nullcontext():
        return _train(config, accelerator)


def _train(config: DictConfig, accelerator: Accelerator) -> Path:
    # --- task, players -------------------------------------------------------------------------------------------
    rank, world_size, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    run_dir, steps = Path(config.run_dir), config.train.steps
    resumed = _agreed_resume_folder(config, accelerator)
    rng.seed_all(config.seed, rank=0)  # the same first weights on every rank
    task = build_task(config)
    codec = None if config.task == "codec" else task.facts()["codec"]
    init = start_from(config.init, task.modules["model"], codec) if config.init and not resumed else {}
    trained_modules = {name: TrainedModule(module, config.optim, accelerator) for name, module in task.modules.items()}
    ema = EMA(trained_modules["model"].module, config.train.ema_decay) if config.train.ema_decay else None

    # --- fresh start or resume -----------------------------------------------------------------------------------
    rng.seed_all(config.seed, rank)  # from here each rank draws its own dropout
    progress = restore(resumed, trained_modules, ema, task.facts(), rank) if resumed else Progress(init=init)
    facts = task.facts()  # now that the weights are in: a denoiser's hold the statistics of its latents
    for module_name in trained_modules.values():
        module_name.wrap()
    for module in task.frozen:
        accelerator.prepare_model(module, evaluation_mode=True)  # changes the module itself
    last_saved = progress.step if resumed and resumed.parent == run_dir / "checkpoints" else None
    log = MetricsLog(run_dir, config, progress.step) if main else None

    # --- data and horizon ----------------------------------------------------------------------------------------
    loader = task.loader("train", config.data.batch_size, rank, world_size)
    valid = _validation_batches(task, config, accelerator) if config.train.eval_every else []
    peak, peak_source = peak_flops(accelerator.device, precision)
    if main:
        first = micro_batches(loader.batch(progress.step), config.train.micro_batch_size)
        print(run_summary(task, config, loader, first, world_size, progress.step))
        devices = f"{world_size} x {accelerator.device.type} {precision}"
        print(f"device       {devices}, peak {peak / 1e12:.3g} TFLOP/s each ({peak_source})")
        print(f"run folder   {run_dir}{f', going on from {resumed.name}' if resumed else ''}", flush=True)
    speed = Speed(peak * world_size)

    # --- steps ---------------------------------------------------------------------------------------------------
    with stop_requests() as requested, contextlib.closing(loader.iterate(progress.step)) as batches:
        stop = interrupt = False
        while progress.step < steps and not stop:
            begun = time.perf_counter()
            rate = learning_rate(progress.step, steps, config.optim)
            for name, module_name in trained_modules.items():
                set_learning_rate(module_name.optimizer, rate if name == "model" else config.optim.module_lr[name])
                module_name.module.train()
            micro = micro_batches(next(batches), config.train.micro_batch_size)
            shares, work = gradients(task, trained_modules, micro, progress.step, accelerator)
            asked = requested()
            values, (stop, interrupt) = all_reduce_metrics(shares, accelerator, (bool(asked), asked == INTERRUPT))
            values |= clip_gradients(trained_modules, config.optim.clip)
            check_finite(progress.step + 1, values)
            for module_name in trained_modules.values():
                module_name.update()
            values |= task.after_step(progress.step)
            progress.step += 1
            progress.samples_seen += config.data.batch_size
            if ema is not None:
                ema.update(progress.step)
            speed.add(*(metric * world_size for metric in work))
            progress.flops += work[2] * world_size
            progress.seconds += time.perf_counter() - begun

            if log and _due(progress.step, steps, config.train.log_every):
                spent = {"samples": progress.samples_seen, "flops": progress.flops, "seconds": progress.seconds}
                values |= {"lr": rate, **speed.rates(), **spent}
                log.write(progress.step, values)
                print(progress_line(progress.step, steps, values), flush=True)
            pause = time.perf_counter()
            if valid and _due(progress.step, steps, config.train.eval_every):
                progress.valid = _validate(task, trained_modules, ema, valid, progress.step, accelerator)
                if log:
                    log.write(progress.step, progress.valid)
                    print(validation_line(progress.step, progress.valid), flush=True)
            if log and _due(progress.step, steps, config.train.sample_every):
                with torch.no_grad(), rng.isolated_rng(config.seed), _evaluating(trained_modules, ema):
                    for sample in task.samples(progress.step):
                        log.write_audio(progress.step, *sample)
            if _due(progress.step, steps, config.train.checkpoint_every):
                save(config, trained_modules, ema, progress, facts, accelerator)
                last_saved = progress.step
            speed.pause(pause)

    # --- the end -------------------------------------------------------------------------------------------------
    if last_saved != progress.step:  # told to stop between two checkpoints
        save(config, trained_modules, ema, progress, facts, accelerator)
    if log:
        log.close()
    accelerator.end_training()
    if stop and progress.step < steps:
        where = f"step {progress.step} of {steps} is kept in {run_dir}: run the same command to go on"
        raise KeyboardInterrupt(where) if interrupt else Preempted(where)
    return run_dir


def build_task(config: DictConfig) -> Task:
    """The task named by `config.task`."""
    if config.task == "lm":
        from ssmttm.training.tasks.lm import LanguageModelTask

        return LanguageModelTask(config)
    if config.task == "codec":
        from ssmttm.training.tasks.codec import CodecTask

        return CodecTask(config)
    if config.task == "diffusion":
        from ssmttm.training.tasks.diffusion import DiffusionTask

        return DiffusionTask(config)
    if config.task == "distill":
        from ssmttm.training.tasks.distill_lm import DistillTask

        return DistillTask(config)
    if config.task == "distill_codec":
        from ssmttm.training.tasks.distill_codec import CodecDistillTask

        return CodecDistillTask(config)
    if config.task == "distill_text":
        from ssmttm.training.tasks.distill_text import TextDistillTask

        return TextDistillTask(config)
    known = "lm, diffusion, codec, distill, distill_codec and distill_text"
    raise UserError(f"task={config.task} is unknown: there are {known}")


def _due(step: int, steps: int, every: int) -> bool:
    """Every so many steps and at the last one; `every` 0 is never."""
    return bool(every) and (step % every == 0 or step == steps)


def _agreed_resume_folder(config: DictConfig, accelerator: Accelerator) -> Path | None:
    """`resume_folder`, found by the main process for all."""
    found = [resume_folder(config) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def _validation_batches(task: Task, config: DictConfig, accelerator: Accelerator) -> list[Batch]:
    """The same fixed micro-batches of the valid split at every validation."""
    loader = task.loader("valid", config.data.batch_size, accelerator.process_index, accelerator.num_processes)
    count = min(config.train.eval_batches, loader.steps_per_epoch)
    return [micro for n in range(count) for micro in micro_batches(loader.batch(n), config.train.micro_batch_size)]


def _validate(
    task: Task, trained_modules: dict[str, TrainedModule], ema: EMA | None, batches: list[Batch], step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean losses over the fixed validation batches, of the averaged weights, named valid/..."""
    totals: Losses = {}
    counts = global_denominators(task, batches, accelerator)
    modules = {name: module_name.module for name, module_name in trained_modules.items()}
    with torch.no_grad(), rng.isolated_rng(0), _evaluating(trained_modules, ema):
        for batch in batches:
            losses = task.validation(modules, to_device(batch, accelerator.device), counts, step)
            add(totals, {"loss": objective(losses, task.loss_weights), **losses})
    values, _ = all_reduce_metrics(totals, accelerator)
    return {f"valid/{name}": value for name, value in values.items()}


@contextlib.contextmanager
def _evaluating(trained_modules: dict[str, TrainedModule], ema: EMA | None) -> Iterator[None]:
    """Modules in eval mode, the model with its averaged weights."""
    with ema.swapped_in() if ema is not None else contextlib.nullcontext():
        for module_name in trained_modules.values():
            module_name.module.eval()
        yield
