"""The keys of optimisers (configs/optim) and learning rate schedules (configs/schedule)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AdamWConfig:
    """AdamW (arXiv 1711.05101). No decay on norms, biases, A_log, D, dt_bias."""

    kind: str = "adamw"
    lr: float = 1.0e-3  # peak of the model
    module_lr: Any = field(default_factory=dict)  # peak rates of the task's other modules, with the same schedule
    weight_decay: float = 0.01
    decay_embeddings: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1.0e-8
    clip: float | None = 1.0  # maximum gradient norm of each module; null: no clipping


@dataclass
class MuonConfig(AdamWConfig):
    """Muon (arXiv 2502.16982) for the model's matrices, AdamW for the rest: embeddings, heads, convolutions, vectors,
    and the modules beside the model. The updates have AdamW's size, so both use the same learning rate and decay."""

    kind: str = "muon"
    momentum: float = 0.95
    newton_schulz_steps: int = 5


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step: a linear warm-up, then by its kind."""

    kind: str = "cosine"
    warmup_steps: int = 100
    min_lr: float = 1.0e-5  # of the model at the end; the other modules end at the same fraction of their peaks
    length: int | None = None  # its steps; null: train.steps when the run began


@dataclass
class ConstantConfig(ScheduleConfig):
    """The peak rate after the warm-up; `min_lr` is not reached."""

    kind: str = "constant"


@dataclass
class LinearConfig(ScheduleConfig):
    """A linear decay from the end of the warm-up."""

    kind: str = "linear"


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay (arXiv 2405.18392): the peak rate until the last steps, which decay linearly."""

    kind: str = "wsd"
    decay_steps: int | None = None  # null: a fifth of the schedule


OPTIMISERS = (AdamWConfig, MuonConfig)
SCHEDULES = (ScheduleConfig, ConstantConfig, LinearConfig, WSDConfig)


@dataclass
class CodecModuleRates:
    discriminator: float = 1.0e-3


@dataclass
class CodecDistillModuleRates(CodecModuleRates):
    projections: float = 1.0e-3


@dataclass
class LMModuleRates:
    tag_head: float = 1.0e-3


@dataclass
class DistillModuleRates:
    projections: float = 1.0e-3
    weighting: float = 1.0e-2


@dataclass
class TextDistillModuleRates:
    lm: float = 1.0e-4
