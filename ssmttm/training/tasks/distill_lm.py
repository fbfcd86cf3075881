"""Distillation of a language model: a student learns from the data and from what its teacher says of the same codes.

Shapes: b items of a micro-batch, K codebooks, S positions, V codes, n codes of a target, D width of the student.
"""

import contextlib
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
from ssmttm.distill.losses import Target, check_temperature, divergence, student_log_q, target
from ssmttm.distill.teacher import Teacher
from ssmttm.distill.teacher_cache import TeacherLogitCache, write_cache
from ssmttm.distill.weight_transfer import channel_importance, transfer_weights
from ssmttm.distill.weighting import LossWeighting
from ssmttm.errors import UserError
from ssmttm.text.condition import TextCondition
from ssmttm.training.accelerator import build_accelerator
from ssmttm.training.run import check_least
from ssmttm.training.step import to_device
from ssmttm.training.tasks.base import Batch, Losses
from ssmttm.training.tasks.lm import LanguageModelTask, LMBatch

LOSSES = ("cross_entropy", "kl", "hidden")
_LOOK_EVERY = 10  # steps between looks at the gradients' norms
_CALIBRATION = 4  # batches from which the importance of channels is measured


class DistillTask(LanguageModelTask):
    """A student TokenLM learns a teacher's distributions, streams and mixers along with the codes of a store.

    For the first `distill.mixer_steps` its mixers alone are matched, then for `distill.hidden_steps` its streams; from
    then on all of `cross_entropy`, `kl` and `hidden` that have a weight in `losses`, weighted by `distill.weighting`.

    Args:
        config: as of `LanguageModelTask`, `teacher`, `distill`.

    Raises:
        UserError: no teacher, one of other codes or another text encoder, settings that contradict each other.
    """

    def __init__(self, config: DictConfig) -> None:
        if not config.teacher:
            raise UserError("teacher is not set: give a run, a model folder or an embedded model: teacher=tiny_lm")
        _check_settings(config)
        super().__init__(config)
        settings = config.distill
        self.settings, self.loss_weights = settings, {"distillation": 1.0}
        null = TextCondition.stack([torch.from_numpy(self.store.text("").astype(np.float32))])
        self.teacher = Teacher(config.teacher, settings.guidance_scale, null)
        self.frozen, self.null_condition = [self.teacher.model], self.teacher.folder.null_condition
        self.guidance_scale = self.teacher.guidance_of_student
        self.teacher.check_student(config.model, config.pattern, self.store.info)
        self.blocks = layer_map(settings.layer_map, config.model.n_layers, self.teacher.model.config.n_layers)
        if settings.mixer_steps:
            check_mixers(self.model, self.teacher.model)
        if settings.cache and (self.teacher.model.config.chroma or self.teacher.model.config.tempo):
            raise UserError("a cached answer does not know whose melody or tempo is withheld: set distill.cache=null")
        self.cached = TeacherLogitCache(settings.cache, cache_facts(config, self)) if settings.cache else None
        weights = {name: config.losses[name] for name in LOSSES if config.losses[name]}
        self.modules["weighting"] = LossWeighting(settings.weighting, weights)
        if config.losses.hidden:
            widths = config.model.d_model, self.teacher.model.config.d_model
            self.modules["projections"] = HiddenStateProjections(len(self.blocks), *widths)
        self.transferred: list[str] = []
        self.asks = bool(config.losses.kl or config.losses.hidden)
        self._observed: Tensor | None = None
        self._transfer()

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        """`distillation`, to train on, and what it is made of: `cross_entropy`, `kl`, `hidden`, `mixer`."""
        controls = self.controls.dropped(self.controls.of(batch))
        given = self._prepare_batch(batch, controls)
        matching, hidden = step < self.settings.mixer_steps, "projections" in self.modules
        behind = range(1, len(self.blocks) + 1) if hidden else []
        said = trained_modules["model"](given.codes, self._text(batch), return_hidden_states_of=behind, controls=given.controls)
        logits, hidden_states = said if behind else (said, [])
        named = self._code_losses(logits, given, counts)
        traced = traced_mixers(self.teacher.model, self.blocks) if matching else contextlib.nullcontext()
        with traced as seen:
            answer, of_teacher = self._asked(batch, given) if self.asks or matching else (None, [])
        if self.config.losses.kl:
            named["kl"] = self._kl(logits, answer, given, counts)
        if hidden:
            distances = trained_modules["projections"](hidden_states, of_teacher)  # [b, S]
            named["hidden"] = (distances * given.real.float().mean(1)).sum() / counts[:-1].mean()
        share = len(batch["ids"]) / counts[-1]
        if matching:
            text = self.model.text(self._text(batch))
            errors = mixer_error(self.model, text, given.real.any(1), self.blocks, seen)  # [b]
            named["mixer"] = errors.sum() / counts[-1]
        named["distillation"] = self._total(trained_modules, named, share, step)
        return {"model": named}

    def validation(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> Losses:
        """Cross-entropy on the data: so students compare with each other and with those that had no teacher."""
        named = super().validation(trained_modules, batch, counts, step)
        return named | {"distillation": named["cross_entropy"]}

    def after_step(self, step: int) -> dict[str, float]:
        """Let the weighting take note of this step's sizes; the weights, to log."""
        weighting = self.modules["weighting"]
        if self._observed is not None:
            weighting.observe(reduce(self._observed, "sum"))
            self._observed = None
        return {f"weight_{n}": w for n, w in zip(weighting.given, weighting.weights().tolist(), strict=True)}

    def work(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """As of a language model; the teacher has no backward pass, so its FLOPs count a third."""
        codes, seconds, flops = super().work(batch, step)
        if (self.asks or step < self.settings.mixer_steps) and self.cached is None:
            length, items = self.pattern.sequence_length(batch["codes"].shape[-1]), len(batch["ids"])
            flops += items * self.teacher.flops(length, batch["text"].mask.shape[1]) / 3
        return codes, seconds, flops

    def facts(self) -> dict[str, Any]:
        """With the teacher, the licences of whose data are the student's too, and how many parameters came from it."""
        facts = super().facts()
        licences = (self.teacher.folder.licences or {}) | facts["licences"]
        text = facts["text"] | {"null_condition": self.null_condition}
        teacher = self.teacher.facts() | {"transferred": len(self.transferred)}
        return facts | {"licences": licences, "text": text, "teacher": teacher}

    def ask(self, batch: Batch, k: int | None) -> Target:
        """The teacher's distributions for a batch, [b, K, S, n], at the temperature of the settings."""
        given = self._prepare_batch(batch, self.controls.of(batch))
        return target(self.teacher(given.codes, self._text(batch), given.controls)[0], self.settings.temperature, k)

    def _asked(self, batch: Batch, given: LMBatch) -> tuple[Target, list[Tensor]]:
        """The teacher's distributions, from the cache if there is one, and its streams behind the mapped blocks, if any
        are learnt from."""
        if self.cached is not None:
            return Target(*(None if p is None else p.to(given.codes.device) for p in self.cached(batch["ids"]))), []
        blocks = self.blocks if "projections" in self.modules else []
        logits, hidden_states = self.teacher(given.codes, self._text(batch), given.controls, blocks)
        return target(logits, self.settings.temperature), hidden_states

    def _kl(self, logits: Tensor, answer: Target, given: LMBatch, counts: Tensor) -> Tensor:
        """The divergence, times the temperature's square: so its gradient keeps its size (arXiv 1503.02531)."""
        temperature = self.settings.temperature
        log_q = student_log_q(logits[..., : self.codebook_size], answer, temperature)
        each = divergence(log_q, answer.log_p, self.settings.divergence, self.settings.skew)  # [b, K, S]
        return temperature**2 * self._over_codebooks(each.masked_fill(~given.real, 0).sum((0, 2)), counts)

    def _total(self, trained_modules: Mapping[str, nn.Module], named: Losses, share: Tensor, step: int) -> Tensor:
        """What is trained on in this step. In the first phases the others take part with weight 0: every parameter has
        a gradient, as several devices need it."""
        weighted = trained_modules["weighting"](named, share)
        if step < self.settings.mixer_steps:
            return named["mixer"] + 0 * weighted
        if step < self.settings.mixer_steps + self.settings.hidden_steps:
            return named["hidden"] + 0 * weighted
        learnt = [named[name] for name in self.modules["weighting"].given]
        if self.settings.weighting == "magnitude":
            sizes = torch.stack(learnt).detach()
            self._observed = sizes if self._observed is None else self._observed + sizes
        elif self.settings.weighting == "gradient" and self._observed is None and step % _LOOK_EVERY == 0:
            embedding = self.model.embedding.weight  # which every loss reaches through all of the model
            slopes = [torch.autograd.grad(loss, embedding, retain_graph=True)[0] for loss in learnt]
            self._observed = torch.stack([slope.norm() for slope in slopes])
        return weighted

    def _transfer(self) -> None:
        """Start the student from its teacher's weights, as `distill.transfer` asks. A checkpoint's replace them."""
        asked = self.settings.transfer
        if asked.layers is None and asked.width is None:
            return
        folder = self.teacher.folder
        if "weights" in folder.card:
            raise UserError(
                f"the weights of the teacher {folder.name} are {folder.card['weights']}, which distill.transfer cannot "
                f"take: give the one it was made from"
            )
        importance = None
        if asked.width == "importance":
            loader = self.loader("train", self.config.data.batch_size, 0, 1)
            batches = [loader.batch(n) for n in range(_CALIBRATION)]
            shown = [(self._prepare_batch(b, self.controls.of(b)), self._text(b)) for b in batches]
            importance = channel_importance(self.teacher.model, [(given.codes, text) for given, text in shown])
        self.transferred = transfer_weights(self.teacher.model, self.model, asked.layers, asked.width, importance)


def cache_facts(config: DictConfig, task: DistillTask) -> dict[str, Any]:
    """What a teacher's cached answers depend on."""
    data, settings = config.data, config.distill
    return {
        "teacher": task.teacher.fingerprint, "store": task.store.fingerprint, "pattern": config.pattern,
        "seed": config.seed, "frames": data.frames, "caption_dropout": data.caption_dropout,
        "temperature": settings.temperature, "guidance_scale": settings.guidance_scale,
    }  # fmt: skip


def cache_teacher(config: DictConfig, out: Path, k: int) -> Path:
    """Write the teacher's answers for every segment of the training split, as `data.fixed_crops` shows them.

    It is asked on the device and in the precision that the training would have here.

    Args:
        config: of the distillation that is to read them.
        k: codes kept of each distribution.

    Raises:
        UserError: there is one in the folder already, or a setting is wrong.
    """
    config = config.copy()
    config.data.fixed_crops, config.distill.cache = True, None
    config.distill.transfer.layers = config.distill.transfer.width = None  # of the student, who is not asked
    accelerator = build_accelerator(config.train.precision)
    task = DistillTask(config)
    accelerator.prepare_model(task.teacher.model, evaluation_mode=True)
    loader = task.loader("train", config.data.batch_size, 0, 1)
    steps = tqdm(range(loader.steps_per_epoch), desc="asking the teacher", unit="batch")
    answers = ((b["ids"], task.ask(to_device(b, accelerator.device), k)) for b in map(loader.batch, steps))
    return write_cache(out, cache_facts(config, task) | {"k": k, "model": asdict(task.teacher.model.config)}, answers)


def _check_settings(config: DictConfig) -> None:
    settings, losses = config.distill, config.losses
    check_temperature(settings.temperature)
    numbers = [f"distill.{name}" for name in ("skew", "guidance_scale", "mixer_steps", "hidden_steps")]
    check_least(config, dict.fromkeys([*numbers, *(f"losses.{name}" for name in LOSSES)], 0))
    phases, steps = settings.mixer_steps + settings.hidden_steps, config.train.steps
    if phases and phases >= steps:
        raise UserError(
            f"distill.mixer_steps and distill.hidden_steps are {phases} together, train.steps is {steps}: leave steps "
            f"for all losses together, after these phases"
        )
    if not isinstance(settings.transfer, DictConfig):
        raise UserError(f"distill.transfer={settings.transfer}: give distill.transfer.layers and .width, or each null")
    if not any(losses[name] for name in LOSSES):
        raise UserError(f"nothing to learn from: give one of {', '.join(f'losses.{name}' for name in LOSSES)} a weight")
    if losses.tags:
        raise UserError("losses.tags has no tag head in a distillation: set losses.tags=0")
    if settings.hidden_steps and not losses.hidden:
        raise UserError("distill.hidden_steps match streams, which losses.hidden=0 leaves out: give it a weight")
    if settings.cache and (losses.hidden or settings.mixer_steps):
        raise UserError("a cache holds distributions only: set losses.hidden=0 and distill.mixer_steps=0, or no cache")
    if settings.cache and not config.data.fixed_crops:
        raise UserError("a cached answer belongs to one crop of each segment: set data.fixed_crops=true")
    if config.init and (settings.transfer.layers is not None or settings.transfer.width is not None):
        raise UserError("init and distill.transfer both say where the student starts: leave one of them null")
