"""Distillation of a language model from a teacher's logits, hidden states and mixers.

Shapes: b items of a micro-batch, K codebooks, S positions, V codes, n codes of a target, D width of the student.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from ssmttm.distill.hidden_states import HiddenStateProjections, check_mixers, mixer_error, traced_mixers
from ssmttm.distill.layer_map import layer_map
from ssmttm.distill.losses import SoftTarget, check_temperature, divergence_sums, soft_target
from ssmttm.distill.teacher import Teacher
from ssmttm.distill.teacher_cache import TeacherLogitCache, write_cache
from ssmttm.distill.weight_transfer import channel_importance, copy_control_predictor, transfer_weights
from ssmttm.distill.weighting import LossWeighting
from ssmttm.errors import UserError
from ssmttm.models import TokenLM
from ssmttm.models.controls import CONFIG_KEYS
from ssmttm.text.condition import TextCondition
from ssmttm.training.parallel.accelerator import build_accelerator
from ssmttm.training.run import check_minimum
from ssmttm.training.step import to_device
from ssmttm.training.tasks.base import Batch, Losses
from ssmttm.training.tasks.lm import LanguageModelTask, LMBatch

LOSSES = ("cross_entropy", "kl", "hidden")
_GRADIENT_EVERY = 10  # steps between measurements of gradient norms
_CALIBRATION_BATCHES = 4


class DistillTask(LanguageModelTask):
    """A student TokenLM learns a store's codes and its teacher's distributions, hidden states and mixer outputs.

    The first `distill.mixer_steps` train on mixer matching alone, the next `distill.hidden_steps` on hidden states
    alone, all others on `cross_entropy`, `kl` and `hidden` with the weights in `losses` and `distill.weighting`.
    """

    model: TokenLM

    def __init__(self, config: DictConfig) -> None:
        if not config.teacher:
            raise UserError(
                "teacher is not set: set it to a run, a model folder or an embedded model, as teacher=tiny_lm"
            )
        _check_settings(config)
        super().__init__(config)
        settings = config.distill
        self.settings, self.loss_weights = settings, {"distillation": 1.0}
        null = TextCondition.stack([torch.from_numpy(self.store.text("").astype(np.float32))])
        self.teacher = Teacher(config.teacher, settings.guidance_scale, null)
        self.frozen, self.null_condition = [self.teacher.model], self.teacher.folder.null_condition
        self.sampling_defaults = self.teacher.student_sampling
        self.teacher.check_student(config.model, config.pattern, self.store.info)
        teacher = self.teacher.model.config
        self.teacher_blocks = layer_map(settings.layer_map, config.model.n_layers, teacher.n_layers)
        if settings.mixer_steps:
            check_mixers(self.model, self.teacher.model)
        self.cache = TeacherLogitCache(settings.cache, cache_metadata(config, self)) if settings.cache else None
        weights = {name: config.losses[name] for name in LOSSES if config.losses[name]}
        self.weighting = self.modules["weighting"] = LossWeighting(settings.weighting, weights)
        if config.losses.hidden:
            widths = config.model.d_model, teacher.d_model
            self.modules["projections"] = HiddenStateProjections(len(self.teacher_blocks), *widths)
        self.needs_teacher = bool(config.losses.kl or config.losses.hidden)
        self._observed_sizes: Tensor | None = None
        self.transferred = self._transfer_weights()
        self.transferred += copy_control_predictor(self.teacher.model, self.model)
        if self.model.control_predictor is not None:
            self.model.control_predictor.requires_grad_(False)  # the teacher's, which this training leaves as it is

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, step: int
    ) -> dict[str, Losses]:
        """`distillation`, the training loss, and its parts `cross_entropy`, `kl`, `hidden` and `mixer`."""
        inputs, text = self._prepare_batch(batch), self._text(batch)
        match_mixers, match_hidden = step < self.settings.mixer_steps, "projections" in self.modules
        blocks = range(1, len(self.teacher_blocks) + 1) if match_hidden else []
        output = modules["model"](inputs.codes, text, return_hidden_states_of=blocks, controls=inputs.controls)
        logits, hidden_states = output if match_hidden else (output, [])
        losses = self._code_losses(logits, inputs, denominators)
        with traced_mixers(self.teacher.model, self.teacher_blocks if match_mixers else []) as traced:
            query = self.needs_teacher or match_mixers
            target, teacher_states = self._query_teacher(batch, inputs) if query else (None, [])
        if self.config.losses.kl:
            losses["kl"] = self._kl(logits, target, inputs, denominators)
        if match_hidden:
            distances = modules["projections"](hidden_states, teacher_states)  # [b, S]
            losses["hidden"] = (distances * inputs.valid.float().mean(1)).sum() / denominators[:-1].mean()
        if match_mixers:
            projected = self.model.text(text)
            errors = mixer_error(self.model, projected, inputs.valid.any(1), self.teacher_blocks, traced)  # [b]
            losses["mixer"] = errors.sum() / denominators[-1]
        fraction = len(batch["ids"]) / denominators[-1]
        losses["distillation"] = self._total_loss(modules, losses, fraction, step)
        return {"model": losses}

    def validation(self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, step: int) -> Losses:
        """Cross-entropy on the data, comparable between students and with models trained without a teacher."""
        losses = super().validation(modules, batch, denominators, step)
        return losses | {"distillation": losses["cross_entropy"]}

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Update the loss weighting; returns the weights to log."""
        if self._observed_sizes is not None:
            self.weighting.observe(reduce(self._observed_sizes, "sum"))
            self._observed_sizes = None
        weights = zip(self.weighting.base_weights, self.weighting.weights().detach().unbind(), strict=True)
        return {f"weight_{name}": weight for name, weight in weights}

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """As for a language model; the teacher's FLOPs count a third, as it has no backward pass."""
        codes, seconds, flops = super().throughput(batch, step)
        if (self.needs_teacher or step < self.settings.mixer_steps) and self.cache is None:
            length, items = self.pattern.sequence_length(batch["codes"].shape[-1]), len(batch["ids"])
            flops += items * self.teacher.flops(length, batch["text"].mask.shape[1]) / 3
        return codes, seconds, flops

    def metadata(self) -> dict[str, Any]:
        """With the teacher, the licences of its data, and the number of parameters that were transferred."""
        return self.teacher.student_metadata(super().metadata(), transferred=len(self.transferred))

    def query_teacher(self, batch: Batch, k: int | None) -> SoftTarget:
        """The teacher's top-k distributions for a batch, [b, K, S, n], at `distill.temperature`."""
        inputs = self._prepare_batch(batch)
        logits, _ = self.teacher(inputs.codes, self._text(batch), inputs.controls)
        return soft_target(logits, self.settings.temperature, k)

    def _query_teacher(self, batch: Batch, inputs: LMBatch) -> tuple[SoftTarget, list[Tensor]]:
        """The teacher's distributions, cached or computed, and its hidden states after the mapped blocks if needed."""
        if self.cache is not None:
            return self.cache(batch["ids"]).to(inputs.codes.device), []
        blocks = self.teacher_blocks if "projections" in self.modules else []
        logits, hidden_states = self.teacher(inputs.codes, self._text(batch), inputs.controls, blocks)
        return soft_target(logits, self.settings.temperature), hidden_states

    def _kl(self, logits: Tensor, target: SoftTarget | None, inputs: LMBatch, denominators: Tensor) -> Tensor:
        """The divergence times the squared temperature, which preserves the gradient's scale (arXiv 1503.02531)."""
        assert target is not None
        logits, temperature = logits[..., : self.codebook_size], self.settings.temperature
        kind, skew = self.settings.divergence, self.settings.skew
        sums = divergence_sums(logits, target, inputs.valid, temperature, kind, skew)  # [K]
        return temperature**2 * self._over_codebooks(sums, denominators)

    def _total_loss(self, modules: Mapping[str, nn.Module], losses: Losses, fraction: Tensor, step: int) -> Tensor:
        """The training loss of this step. In the matching phases the other losses have weight 0, so that every
        parameter has a gradient, as several devices need it."""
        weighted = modules["weighting"](losses, fraction)
        if step < self.settings.mixer_steps:
            return losses["mixer"] + 0 * weighted
        if step < self.settings.mixer_steps + self.settings.hidden_steps:
            return losses["hidden"] + 0 * weighted
        values = [losses[name] for name in self.weighting.base_weights]
        if self.settings.weighting == "magnitude":
            sizes = torch.stack(values).detach()
            self._observed_sizes = sizes if self._observed_sizes is None else self._observed_sizes + sizes
        elif self.settings.weighting == "gradient" and self._observed_sizes is None and step % _GRADIENT_EVERY == 0:
            embedding = self.model.embedding.weight
            gradients = [torch.autograd.grad(loss, embedding, retain_graph=True)[0] for loss in values]
            self._observed_sizes = torch.stack([gradient.norm() for gradient in gradients])
        return weighted

    def _transfer_weights(self) -> list[str]:
        """Initialise the student from its teacher by `distill.transfer`; returns the parameters that were set."""
        transfer, folder = self.settings.transfer, self.teacher.folder
        if transfer.layers is None and transfer.width is None:
            return []
        if "weights" in folder.card:
            raise UserError(
                f"the weights of the teacher {folder.name} are {folder.card['weights']}, distill.transfer needs float "
                "weights: use the model that it was quantised from"
            )
        importance = None
        if transfer.width == "importance":
            loader = self.loader("train", self.config.data.batch_size, 0, 1)
            batches = [loader.batch(n) for n in range(_CALIBRATION_BATCHES)]
            inputs = [(self._prepare_batch(b).codes, self._text(b)) for b in batches]
            importance = channel_importance(self.teacher.model, inputs)
        return transfer_weights(self.teacher.model, self.model, transfer.layers, transfer.width, importance)


def cache_metadata(config: DictConfig, task: DistillTask) -> dict[str, Any]:
    """The settings that cached teacher logits depend on."""
    data, settings, teacher = config.data, config.distill, task.teacher.model.config
    controls = [name for name in CONFIG_KEYS.values() if config.model[name] and getattr(teacher, name)]
    return {
        "teacher": task.teacher.fingerprint, "store": task.store.fingerprint, "pattern": config.pattern,
        "seed": config.seed, "frames": data.frames, "caption_dropout": data.caption_dropout,
        "temperature": settings.temperature, "guidance_scale": settings.guidance_scale,
        **{f"{name}_dropout": data[f"{name}_dropout"] for name in controls},
        **({"caption_swap": data.caption_swap} if data.caption_swap else {}),
    }  # fmt: skip


def cache_teacher(config: DictConfig, out: Path, k: int) -> Path:
    """Cache the teacher's top-k logits for every training segment, with the crops of `data.fixed_crops`, for the
    distillation of this config; runs on its device and in its precision."""
    config = config.copy()
    config.data.fixed_crops, config.distill.cache = True, None
    config.distill.transfer.layers = config.distill.transfer.width = None  # the student is not run
    accelerator = build_accelerator(config.train.precision)
    task = DistillTask(config)
    accelerator.prepare_model(task.teacher.model, evaluation_mode=True)
    loader = task.loader("train", config.data.batch_size, 0, 1)
    steps = tqdm(range(loader.steps_per_epoch), desc="querying the teacher", unit="batch")
    batches = (to_device(loader.batch(step), accelerator.device) for step in steps)
    targets = ((batch["ids"], task.query_teacher(batch, k)) for batch in batches)
    metadata = cache_metadata(config, task) | {"k": k, "model": asdict(task.teacher.model.config)}
    return write_cache(out, metadata, targets)


def _check_settings(config: DictConfig) -> None:
    settings, losses = config.distill, config.losses
    check_temperature(settings.temperature)
    keys = [f"distill.{name}" for name in ("skew", "guidance_scale", "mixer_steps", "hidden_steps")]
    check_minimum(config, dict.fromkeys([*keys, *(f"losses.{name}" for name in LOSSES)], 0))
    matching_steps = settings.mixer_steps + settings.hidden_steps
    if matching_steps and config.train.minutes is None and matching_steps >= config.train.steps:
        raise UserError(
            f"distill.mixer_steps + distill.hidden_steps must be below train.steps={config.train.steps}, got "
            f"{matching_steps}"
        )
    if not any(losses[name] for name in LOSSES):
        raise UserError(f"no loss to train on: set one of {', '.join(f'losses.{name}' for name in LOSSES)} above 0")
    if settings.hidden_steps and not losses.hidden:
        raise UserError("distill.hidden_steps needs losses.hidden above 0, got 0")
    if settings.cache and (losses.hidden or settings.mixer_steps):
        raise UserError("the cache holds logits only: set losses.hidden=0 and distill.mixer_steps=0, or no cache")
    if settings.cache and not config.data.fixed_crops:
        raise UserError("cached logits belong to one crop of each segment: set data.fixed_crops=true")
    if config.init and (settings.transfer.layers is not None or settings.transfer.width is not None):
        raise UserError("init and distill.transfer both initialise the student: set one of them to null")
