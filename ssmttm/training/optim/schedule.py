"""Learning rate schedules: the rate as a pure function of the step."""

import math
from collections.abc import Callable

from omegaconf import DictConfig

from ssmttm.errors import UserError


def learning_rate(step: int, length: int, config: DictConfig, module_name: str = "model") -> float:
    """The learning rate of a module: a linear warm-up to its peak, then the schedule of `length` steps.

    `config.optim.lr` is the peak of the model, `config.optim.module_lr` has those of the other modules. All end at the
    same fraction of their peaks, `schedule.min_lr / optim.lr`. `step` 0 is the first.
    """
    optim, schedule = config.optim, config.schedule
    peak = optim.lr if module_name == "model" else optim.module_lr[module_name]
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    lowest = schedule.min_lr / optim.lr if optim.lr else 0.0
    return peak * (lowest + (1 - lowest) * _height(schedule, length)(step))


def check_schedule(config: DictConfig, length: int | None) -> None:
    """Raises UserError for a schedule that does not exist, or that `length` steps cannot hold (None: not known yet)."""
    _height(config.schedule, length or 1)
    if length is not None and (problem := misfit(config, length)):
        raise UserError(problem)


def misfit(config: DictConfig, length: int) -> str | None:
    """What is wrong with a schedule that `length` steps cannot hold, and what to do."""
    schedule = config.schedule
    if schedule.kind != "wsd" or schedule.warmup_steps + _decay_steps(schedule, length) <= length:
        return None
    return (
        f"schedule=wsd: a warm-up of {schedule.warmup_steps} and a decay of {_decay_steps(schedule, length)} steps "
        f"do not fit into {length}: set schedule.decay_steps or schedule.warmup_steps lower, or train longer"
    )


def _height(schedule: DictConfig, length: int) -> Callable[[int], float]:
    """Where the rate is between its lowest (0) and its peak (1), after the warm-up."""
    warmup = schedule.warmup_steps

    def progress(step: int, start: int) -> float:
        return min(1.0, max(0.0, (step - start) / max(1, length - start)))

    match schedule.kind:
        case "cosine":
            return lambda step: 0.5 * (1 + math.cos(math.pi * progress(step, warmup)))
        case "linear":
            return lambda step: 1 - progress(step, warmup)
        case "wsd":
            return lambda step: 1 - progress(step, length - _decay_steps(schedule, length))
        case "constant":
            return lambda step: 1.0
    raise UserError(f"unknown schedule.kind={schedule.kind}: choose schedule=cosine, wsd, linear or constant")


def _decay_steps(schedule: DictConfig, length: int) -> int:
    return schedule.decay_steps if schedule.decay_steps is not None else length // 5
