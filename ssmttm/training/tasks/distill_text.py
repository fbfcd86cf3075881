"""Distillation of a language model's text encoder into a smaller one.

First the student regresses the original encoder's token states after the language model's text projection; and the
states themselves, where others read them, too: a control predictor or a second stage. From `text_student.joint_step` on
both are trained: the language model, which now reads the student, on the store's codes and on its own logits with the
original encoder.

Shapes: b items of a micro-batch, L text tokens of the student, E text width, K codebooks, S positions.
"""

import copy
from collections.abc import Generator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.step_values import StepValues
from ssmttm.distill.layer_map import layer_map
from ssmttm.distill.losses import divergence_sums, soft_target
from ssmttm.distill.teacher import Teacher
from ssmttm.distill.text_alignment import TokenizedCaption, alignment_matrix, tokenize
from ssmttm.errors import UserError
from ssmttm.generation import loading
from ssmttm.models import TokenLM
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import apply_null_condition
from ssmttm.text.student import StudentEncoder, StudentShape, build_student, student_description
from ssmttm.training.data import check_fingerprint
from ssmttm.training.run import check_minimum
from ssmttm.training.tasks.base import Batch, Loader, Losses, Sample
from ssmttm.training.tasks.lm import LanguageModelTask

LOSSES = ("text", "cross_entropy", "kl")
_CALIBRATION_BATCHES = 4


class TextDistillTask(LanguageModelTask):
    """Trains a student text encoder, `model`, with the schedule of `optim`, and from `text_student.joint_step` on the
    language model, `lm`, with the peak rate `optim.module_lr.lm`. `model` and `pattern` are the teacher's."""

    model: TokenLM

    def __init__(self, config: DictConfig) -> None:
        if not config.teacher:
            raise UserError(
                "teacher is not set: set it to a run, a model folder or an embedded model, as teacher=tiny_lm"
            )
        _check_settings(config)
        self.teacher = Teacher(config.teacher)
        self.frozen = [self.teacher.model]
        folder = self.teacher.folder
        self.teacher.check_null_condition()
        if "weights" in folder.card:
            kind = folder.card["weights"]
            raise UserError(f"the weights of the teacher {folder.name} are {kind}: use the model it was quantised from")
        self.null_condition, self.sampling_defaults = folder.null_condition, folder.sampling
        config = config.copy()
        OmegaConf.set_struct(config, False)
        config.model = {"kind": "token_lm", **asdict(self.teacher.model.config)}
        config.pattern = folder.config.pattern
        super().__init__(config)
        self.teacher.check_store(self.store.info)
        self.model.load_state_dict(self.teacher.model.state_dict())
        self.original = load_text_encoder(folder.source("text"), trainable=True)
        check_fingerprint("text", self.original.fingerprint, self.store.info)
        settings = config.text_student
        source = self.original
        if settings.encoder is not None:
            source = load_text_encoder(settings.encoder, trainable=True)
        self.max_tokens = min(source.max_tokens, self.original.max_tokens)
        self.encoder, self.tokenizer = self._build_student(source)
        self.modules = {"model": self.encoder, "lm": self.model}
        self.joint_step: int | None = settings.joint_step
        self._state_scale = 0.0  # of the states themselves beside the projected ones; 0: only the projection is read
        self._mean_square = self._projected_mean_square()
        if self.model.control_predictor is not None or loading.open_second_stage_folder(folder, None) is not None:
            self._state_scale = (self._mean_square / self._state_mean_square()) ** 0.5
            self._mean_square *= 2
        if self.model.control_predictor is not None:
            self.model.control_predictor.requires_grad_(False)  # it reads what the regression keeps

    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> "CaptionLoader":
        codes = super().loader(split, batch_size, rank, world_size)
        return CaptionLoader(codes, self.tokenizer, self.max_tokens, self.original)

    def loss_denominators(self, batch: Batch) -> Tensor:
        """Valid positions by codebook, the number of items and of the student's text tokens, [K + 2]."""
        return torch.cat([super().loss_denominators(batch), batch["student_text"].mask.sum()[None].float()])

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, step: int
    ) -> dict[str, Losses]:
        """`text`, the squared error of the projected states relative to the teacher's mean square; in the joint phase
        also `cross_entropy`, each `codebook_k`, and `kl` from the teacher's logits."""
        return {"model": self._losses_of(modules, batch, denominators, self._is_joint(step))}

    def validation(self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, step: int) -> Losses:
        """All losses at every step."""
        return self._losses_of(modules, batch, denominators, joint=True)

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Of the current phase; the teacher's FLOPs count a third, as it has no backward pass."""
        _, seconds, lm_flops = super().throughput(batch, step)
        flops = float(self.encoder.flops(batch["student_text"].mask.numel()))
        if not self._is_joint(step):
            return 0.0, seconds, flops
        return float(batch["frame_mask"].sum()) * self.n_codebooks, seconds, flops + lm_flops * (1 + 1 / 3)

    def samples(self, step: int) -> list[Sample]:
        """As for a language model, with the student as its text encoder."""
        self._text_encoder = TextEncoder("student", self.encoder, self.tokenizer, "", self.max_tokens)
        return super().samples(step)

    def metadata(self) -> dict[str, Any]:
        """With the teacher, the licences of its data, and what the export needs to rebuild both models."""
        config = self.teacher.folder.config
        lm = {key: config[key] for key in ("task", "pattern", "distill") if key in config}
        if lm.get("distill"):
            lm["distill"] = {**lm["distill"], "cache": None}  # a local path
        blueprint = {
            "lm": OmegaConf.to_container(OmegaConf.create(lm | {"model": self.config.model})),
            "encoder": student_description(self.encoder, self.tokenizer),
        }
        return self.teacher.student_metadata(super().metadata()) | {"blueprint": blueprint}

    def _is_joint(self, step: int) -> bool:
        return self.joint_step is not None and step >= self.joint_step

    def _losses_of(self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, joint: bool) -> Losses:
        """The regression loss, and in the joint phase the losses of the language model."""
        text = batch["student_text"]
        states = modules["model"](text.input_ids, text.mask).last_hidden_state.float()  # [b, L, E]
        losses = {"text": self._squared_error(states, text) / self._mean_square / denominators[-1]}
        if not joint:
            return losses
        return losses | self._lm_losses(modules["lm"], states, batch, denominators[:-1])

    def _squared_error(self, states: Tensor, text: "StudentText") -> Tensor:
        """Squared error of projected states [b, L, E], summed over valid tokens."""
        return (self._project(states, text.mask) - self._project(text.targets, text.mask)).square().sum()

    def _project(self, states: Tensor, mask: Tensor) -> Tensor:
        """What is regressed, 0 at padding: the text projection of the teacher's language model, [b, L, E] -> [b, L, D],
        and the states, if others read them, with as much weight: [b, L, D + E]."""
        projected = self.teacher.model.text(TextCondition(states, mask)).tokens  # [b, L, D]
        if not self._state_scale:
            return projected
        kept = states.masked_fill(~mask[..., None], 0)
        return torch.cat([projected, self._state_scale * kept.to(projected.dtype)], -1)

    def _lm_losses(self, lm: nn.Module, states: Tensor, batch: Batch, denominators: Tensor) -> Losses:
        inputs = self._prepare_batch(batch)
        student_text = TextCondition(states, batch["student_text"].mask)
        text = apply_null_condition(self.null_condition, student_text, batch["captions"])
        logits = lm(inputs.codes, text, controls=inputs.controls)
        losses = self._code_losses(logits, inputs, denominators)
        if self.config.losses.kl:
            target = soft_target(self.teacher(inputs.codes, self._text(batch), inputs.controls)[0])
            sums = divergence_sums(logits[..., : self.codebook_size], target, inputs.valid)  # [K]
            losses["kl"] = self._over_codebooks(sums, denominators)
        return losses

    def _build_student(self, source: TextEncoder) -> tuple[StudentEncoder, Any]:
        """The student before training, and its tokenizer."""
        settings = self.config.text_student
        config: Any = source.model.config
        layers, captions = None, None
        if settings.n_layers is not None:
            layers = layer_map("even", settings.n_layers, config.num_hidden_layers)
        if settings.trim:
            captions = self.store.distinct_captions("train")
        shape = StudentShape(layers, settings.d_model, settings.d_ff, self.max_tokens)
        return build_student(source.model, source.tokenizer, self.original.dim, shape, captions)

    @torch.no_grad()
    def _projected_mean_square(self) -> float:
        """Square of the norm of the projected text, mean over valid tokens of the first batches."""
        batches = self._calibration_text()
        total = sum(self._project(*text).square().sum().item() for text in batches)
        return total / sum(text.mask.sum().item() for text in batches)

    def _state_mean_square(self) -> float:
        """As `_projected_mean_square`, of the states themselves."""
        batches = self._calibration_text()
        total = sum(text.embeddings.masked_fill(~text.mask[..., None], 0).square().sum().item() for text in batches)
        return total / sum(text.mask.sum().item() for text in batches)

    def _calibration_text(self) -> list[TextCondition]:
        loader = self.loader("train", self.config.data.batch_size, 0, 1)
        return [loader.batch(n)["text"] for n in range(_CALIBRATION_BATCHES)]


class StudentText(NamedTuple):
    """Captions in the student's tokens, right-padded, with the states that they regress."""

    input_ids: Tensor  # int64 [b, L]
    mask: Tensor  # bool [b, L], True at valid tokens
    targets: Tensor  # [b, L, E]

    def to(self, device: torch.device) -> "StudentText":
        return StudentText(*(part.to(device) for part in self))


class CaptionLoader:
    """The batches of a `CodesLoader` with `student_text`: the captions in the student's tokens, and the store's states
    of the original encoder aligned to these tokens."""

    def __init__(self, codes: Loader, tokenizer: Any, max_tokens: int, original: TextEncoder) -> None:
        self.codes, self.steps_per_epoch = codes, codes.steps_per_epoch
        self.student = copy.deepcopy(tokenizer), max_tokens  # copies: tokenizers are not thread-safe
        self.original = copy.deepcopy(original.tokenizer), original.max_tokens

    def batch(self, n: int) -> Batch:
        batch = self.codes.batch(n)
        tokenizer, max_tokens = self.student
        student = tokenize(tokenizer, batch["captions"], max_tokens)
        original = tokenize(self.original[0], batch["captions"], self.original[1])
        states = [rows[mask] for rows, mask in zip(*batch["text"], strict=True)]
        targets = [_align_states(*caption) for caption in zip(student, original, states, strict=True)]
        ids = [torch.tensor(caption.ids) for caption in student]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in ids]
        text = StudentText(
            pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(masks, True), pad_sequence(targets, True)
        )
        return batch | {"student_text": text}

    def iterate(self, start: int) -> Generator[Batch, None, None]:
        return prefetch_batches(self.batch, start, 2)


def _align_states(student: TokenizedCaption, original: TokenizedCaption, states: Tensor) -> Tensor:
    """Token states [L', E] of the original tokenizer averaged to the student's tokens, [L, E]."""
    if len(states) != len(original.ids):
        raise UserError(
            f"the store holds {len(states)} token states of a caption with {len(original.ids)} tokens: prepare it again"
        )
    return alignment_matrix(student, original) @ states


def _check_settings(config: DictConfig) -> None:
    settings, steps = config.text_student, config.train.steps
    if config.init:
        raise UserError(
            f"init={config.init} is not supported here: set init=null, text_student.encoder for the text encoder and "
            "teacher for the language model"
        )
    check_minimum(config, {f"losses.{name}": 0 for name in LOSSES})
    minimum = {"n_layers": 1, "d_model": 1, "d_ff": 1, "joint_step": 0}
    check_minimum(config, {f"text_student.{name}": n for name, n in minimum.items()})
    if settings.joint_step is not None and config.train.minutes is None and settings.joint_step >= steps:
        raise UserError(f"text_student.joint_step must be below train.steps={steps} or null, got {settings.joint_step}")
    if not config.losses.text:
        raise UserError("losses.text must be above 0, got 0")
