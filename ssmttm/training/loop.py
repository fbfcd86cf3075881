"""The training loop, the same sequence for every task and every number of devices.

Accelerate provides the device, the autocast and the gradient all-reduce only. Batches and the learning rate are pure
functions of the step; generator states and checkpoints are handled here. So a run that is stopped and resumed equals an
uninterrupted run (on a CPU bit for bit).
"""

import contextlib
import math
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig
from torch import Tensor

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
        return Training(config, accelerator, watchdog).run()


class Step(NamedTuple):
    """What the loop has to know of a step that is done.

    Attributes:
        numbers: losses, norms, the learning rate and the number of skipped steps; {} if they were not read.
        skipped_in_a_row: steps until now, if that was read.
        log_is_due: whether a line is due.
    """

    numbers: dict[str, float]
    skipped_in_a_row: int
    log_is_due: bool


class Training:
    """A run: its modules, its data and how far it is. `run` has the loop; what a step does is below it, in its order.

    All ranks must construct it together, and call `run` once. Raises as `train`.
    """

    def __init__(self, config: DictConfig, accelerator: Accelerator, watchdog: Watchdog) -> None:
        self.config, self.accelerator, self.watchdog = config, accelerator, watchdog
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.main, self.run_dir = accelerator.is_main_process, Path(config.run_dir)
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self.waits_for_device = accelerator.device.type == "cpu"
        self.ranks = Ranks(accelerator, watchdog)
        resumed = resume_folder(config) if self.main else None
        self.ranks.wait()
        self.resumed: Path | None = broadcast_object_list([resumed])[0]
        self._build_modules()
        self._build_schedule()
        self.log = MetricsLog(self.run_dir, config, self.progress.step) if self.main else None
        self._build_data()

    def _build_modules(self) -> None:
        """The task and its modules, with the weights and the progress of a new or a resumed run."""
        config, accelerator = self.config, self.accelerator
        rng.seed_all(config.seed, rank=0)  # the same initial weights on every rank
        self.task = build_task(config)
        codec = None if config.task == "codec" else self.task.metadata()["codec"]
        new = config.init and not self.resumed
        init = load_initial_weights(config.init, self.task.modules["model"], codec) if new else {}
        self.task.add_adapter()
        sharding = build_sharding(config.task, self.task.modules, accelerator)
        self.is_sharded = sharding is not None
        self.modules = {
            name: TrainedModule(name, module, config.optim, accelerator, sharding)
            for name, module in self.task.modules.items()
        }
        self.model = self.modules["model"]
        self.ema = EMA(self.model.module, config.train.ema_decay) if config.train.ema_decay else None
        rng.seed_all(config.seed, self.rank)  # from here each rank draws its own dropout
        self.progress = self._restore(self.resumed) if self.resumed else Progress(init=init)
        self.metadata = self.task.metadata()  # with the statistics of a denoiser's latents, which are weights
        set_up_blocks(self.model.module, config.train.recompute, config.train.compile)
        for module in self.modules.values():
            module.wrap()
        for frozen in self.task.frozen:
            accelerator.prepare_model(frozen, evaluation_mode=True)  # in place

    def _restore(self, folder: Path) -> Progress:
        return restore(folder, self.modules, self.ema, self.task.metadata(), self.rank)

    def _build_schedule(self) -> None:
        """The length of the run and of its learning rate's schedule, and what decides on skipped steps."""
        config, progress = self.config, self.progress
        progress.schedule_steps, self.warning = schedule_length(config, self.resumed)
        check_schedule(config, progress.schedule_steps if config.train.minutes is None else None)
        done = (progress.step, progress.seconds, progress.timed_steps)
        self.length = RunLength(config.train.steps, config.train.minutes, *done)
        self.skipping = SkipStep(self.accelerator.device, config.train.skip_outliers)
        self.rollbacks, self.rollback_lr = config.train.rollbacks, config.train.rollback_lr
        if progress.skipping:
            self.skipping.load(progress.skipping)

    def _build_data(self) -> None:
        """The batches, and what is measured over them; prints the summary of the run."""
        config, device, world_size = self.config, self.accelerator.device, self.world_size
        self.batch_size = StepValues(config.data.batch_size, config.data.batch_size_schedule)
        self.loader = self.task.loader("train", self.batch_size, self.rank, world_size)
        has_validation = bool(config.train.eval_every)
        self.valid = validation_batches(self.task, config, self.accelerator) if has_validation else []
        peak, source = peak_flops(device, self.precision)
        if self.main:
            self._print_summary(f"peak {peak / 1e12:.3g} TFLOP/s each ({source})")
        self.throughput = Throughput(peak * world_size, lambda: world_size * measured_peak(device, self.precision))
        self.profiler = StepProfiler(config.train.profile, self.run_dir, self.rank, device)

    def _print_summary(self, peak: str) -> None:
        config, store, device = self.config, self.task.store, self.accelerator.device
        first = micro_batches(self.loader.batch(self.progress.step), config.train.micro_batch_size)
        print(run_summary(self.task, config, self.length, self.loader, first, self.world_size, self.progress.step))
        print(f"device       {self.world_size} x {device.type} {self.precision}, {peak}")
        resumed = f", resumed from {self.resumed.name}" if self.resumed else ""
        print(f"run folder   {self.run_dir}{resumed}", flush=True)
        no_captions = no_captions_warning(store, config.data.store, first[0])
        for line in (self.warning, no_captions, short_segments_warning(store, config.data.store, config)):
            if line:
                _warn(line)

    def run(self) -> Path:
        """Train to the end, or until a signal; returns the run folder."""
        train, progress = self.config.train, self.progress
        with (
            stop_requests() as self.requested,
            contextlib.closing(Batches(self.loader, self.watchdog, progress.step + progress.left_out)) as self.batches,
            contextlib.closing(
                CheckpointWriter(self.config, self.accelerator, self.resumed, self.is_sharded)
            ) as self.writer,
            contextlib.closing(self.profiler),
        ):
            self.stop = self.interrupt = False
            saved_step = self.progress.step if self.resumed else None
            while self.progress.step < self.length.steps and not self.stop:
                step = self._step()
                if not self.length.is_decided:
                    self._decide_length()
                if step.skipped_in_a_row >= train.skip_limit:
                    self._roll_back(step)
                    continue
                if self.log and step.log_is_due:
                    self._log_step(step)
                pause_start = time.perf_counter()
                if self.valid and self._is_due(train.eval_every):
                    self._validate()
                if self._is_due(train.sample_every):
                    self._sample()
                self.writer.poll()
                if self._is_due(train.checkpoint_every):
                    self._save()
                    saved_step = self.progress.step
                self.throughput.pause(pause_start)
            if saved_step != self.progress.step:  # stopped between two checkpoints
                self._save()
            self.writer.wait(last=True)
        self.ranks.wait()
        if self.log:
            self.log.close()
        self.accelerator.end_training()
        if self.stop and self.progress.step < self.length.steps:
            done = f"saved step {self.progress.step} of {self.length.steps} in {self.run_dir}"
            message = f"{done}: run the same command to continue"
            raise KeyboardInterrupt(message) if self.interrupt else Preempted(message)
        return self.run_dir

    def _step(self) -> Step:
        """One optimiser step. On a device, its values are read only if a line is due."""
        config, progress = self.config, self.progress
        start, waited = time.perf_counter(), self.batches.waited
        self.profiler.before_step(progress.step + 1)
        rates = {
            name: progress.lr_factor * learning_rate(progress.step, progress.schedule_steps, config, name)
            for name in self.modules
        }
        for name, module in self.modules.items():
            module.set_learning_rate(rates[name])
            module.module.train()
        micro = micro_batches(self.batches.next(), config.train.micro_batch_size)
        with self.watchdog.doing(f"in step {progress.step + 1}"):
            losses, (tokens, seconds, flops) = gradients(
                self.task, self.modules, micro, progress.step, self.accelerator
            )
            signal = self.requested()
            values = all_reduce_losses(losses, self.accelerator) | clip_gradients(self.modules, config.optim.clip)
            skip = self.skipping.check(values)
            for module in self.modules.values():
                module.update(skip)
            logged = {**values, **self._after_update()}
            self.stop, self.interrupt = self.ranks.any([bool(signal), signal == INTERRUPT])
        progress.samples_seen += self.batch_size(progress.step)
        progress.step += 1
        log_is_due = self._is_due(config.train.log_every)
        numbers: dict[str, float] = {}
        in_a_row = 0
        if self.waits_for_device or log_is_due or not self.length.is_decided:
            skipped, in_a_row = self.skipping.counts()
            numbers = to_numbers(logged) | {"lr": rates["model"], "skipped_steps": skipped}
        ranks = self.world_size
        self.throughput.add(tokens * ranks, seconds * ranks, flops * ranks, self.batches.waited - waited)
        progress.flops += flops * ranks
        progress.seconds += time.perf_counter() - start
        self.profiler.after_step(progress.step)
        return Step(numbers, in_a_row, log_is_due)

    def _after_update(self) -> dict[str, float | Tensor]:
        """What follows the optimisers' step; returns values to log."""
        reseeded = self.task.restart_codes(self.progress.step)
        self.model.reset_moments(reseeded)
        logged = self.task.after_step(self.progress.step)
        if self.ema is not None:
            self.ema.reset_rows(reseeded)
            self.ema.update(self.progress.step + 1)
        return logged

    def _decide_length(self) -> None:
        """With train.minutes: estimate the number of steps again, and fit the schedule to it."""
        config, length = self.config, self.length
        length.update(broadcast_object_list([self.progress.seconds])[0])
        self.progress.schedule_steps = config.schedule.length or length.steps
        if not length.is_decided:
            return
        self.progress.timed_steps = length.steps
        if self.main:
            print(f"steps        {length.steps:,} take {config.train.minutes:g} minutes", flush=True)
            if problem := misfit(config, self.progress.schedule_steps):
                _warn(problem)

    def _roll_back(self, step: Step) -> None:
        """After too many skipped steps: go back to the last checkpoint, with a lower rate and without the batches since
        then. Raises UserError if there is none, or it was done too often."""
        failed = self.progress
        self.writer.wait()
        saved: Path | None = broadcast_object_list([self.writer.saved])[0]
        problem = _describe_skips(failed.step, step)
        if saved is None or failed.rollbacks >= self.rollbacks:
            raise UserError(f"{problem}; {_advice(saved)}")
        progress = self._restore(saved)
        self.progress = replace(
            progress,
            schedule_steps=failed.schedule_steps,
            timed_steps=failed.timed_steps,
            rollbacks=failed.rollbacks + 1,
            left_out=failed.left_out + failed.step - progress.step,
            lr_factor=failed.lr_factor * self.rollback_lr,
        )
        self.skipping.start_again()
        self.batches.go_to(self.progress.step + self.progress.left_out)
        if self.log:
            self.log.close()
            self.log = MetricsLog(self.run_dir, self.config, self.progress.step)
            _warn(f"{problem}; rolled back to {saved.name}")

    def _log_step(self, step: Step) -> None:
        assert self.log is not None
        progress = self.progress
        totals = {"samples": progress.samples_seen, "flops": progress.flops, "seconds": progress.seconds}
        memory = {"peak_memory_gib": peak_memory(self.accelerator.device)}
        numbers = {**step.numbers, **self.throughput.rates(), **totals, **memory}
        self.log.write(progress.step, numbers)
        print(progress_line(progress.step, self.length.steps, numbers), flush=True)

    def _validate(self) -> None:
        progress = self.progress
        with self.watchdog.doing("validating"):
            progress.valid = validate(self.task, self.modules, self.ema, self.valid, progress.step, self.accelerator)
        if self.log:
            self.log.write(progress.step, progress.valid)
            print(validation_line(progress.step, progress.valid), flush=True)

    def _sample(self) -> None:
        """The main process samples, with the averaged weights; the others wait."""
        with evaluating(self.modules, self.ema), self.model.gathered():
            if self.log:
                with torch.no_grad(), rng.isolated_rng(self.config.seed):
                    for sample in self.task.samples(self.progress.step):
                        self.log.write_audio(self.progress.step, *sample)
            self.ranks.wait()

    def _save(self) -> None:
        self.progress.skipping = self.skipping.state()
        self.writer.save(self.modules, self.ema, self.progress, self.metadata)

    def _is_due(self, every: int) -> bool:
        """Every `every` steps and at the last step; 0: never."""
        step = self.progress.step
        return bool(every) and (step % every == 0 or step == self.length.steps)


def build_task(config: DictConfig) -> Task:
    """The task named by `config.task`."""
    if config.task not in TASKS:
        raise UserError(f"unknown task={config.task}: choose from {', '.join(TASKS)}")
    module, name = TASKS[config.task]
    return getattr(import_module(f"ssmttm.training.tasks.{module}"), name)(config)


def _describe_skips(number: int, step: Step) -> str:
    bad = [name for name, value in step.numbers.items() if not math.isfinite(value)]
    found = f"{', '.join(bad)} is not a finite number" if bad else "the loss or gradient norm is far above recent ones"
    before = step.skipped_in_a_row - 1
    since = f", as in the {before} steps before" if before else ""
    return f"step {number}: {found}{since}; the weights were not updated"


def _advice(saved: Path | None) -> str:
    if saved is None:
        return "no checkpoint was written yet: lower optim.lr or optim.clip and start again"
    return f"the last checkpoint is {saved}: lower optim.lr or optim.clip and start from it, with another run_dir"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
