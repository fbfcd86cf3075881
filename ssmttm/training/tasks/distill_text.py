"""A small text encoder in the place of a language model's own, learnt from what that model takes from the text.

First the student's token states are to say, behind the language model's own projection of the text, what those of the
encoder say which it replaces. Then both learn along: the language model, which reads the student, from the codes of the
store and from what it said when it read the original.

Shapes: b items of a micro-batch, L text tokens of the student, E text width, K codebooks, S positions.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssmttm.data.loader import CodesLoader
from ssmttm.data.prefetch import prefetched
from ssmttm.distill.layer_map import layer_map
from ssmttm.distill.losses import divergence, student_log_q, target
from ssmttm.distill.teacher import Teacher
from ssmttm.distill.text_alignment import TokenizedCaption, align, cut
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import apply_null_condition
from ssmttm.text.student import StudentEncoder, StudentShape, build_student, describe
from ssmttm.training.data import check_same
from ssmttm.training.run import check_least
from ssmttm.training.tasks.base import Batch, Losses, Sample
from ssmttm.training.tasks.lm import LanguageModelTask

LOSSES = ("text", "cross_entropy", "kl")
_CALIBRATION = 4  # batches that tell how large the projected text is


class TextDistillTask(LanguageModelTask):
    """A student encoder learns to stand for a teacher's; from `text_student.joint_step` on the language model learns to
    read it. `model`, the encoder, follows the schedule of `optim`; `lm` the constant rate `optim.module_lr.lm`.

    Args:
        config: as of `LanguageModelTask`, `teacher`, `text_student`; `model` and `pattern` are the teacher's.

    Raises:
        UserError: no teacher, one that reads padding or has int8 weights, a store made with another codec or text
            encoder, or a student that cannot be cut from where it starts.
    """

    def __init__(self, config: DictConfig) -> None:
        if not config.teacher:
            raise UserError("teacher is not set: give a run, a model folder or an embedded model: teacher=tiny_lm")
        _check_settings(config)
        self.teacher = Teacher(config.teacher)
        self.frozen = [self.teacher.model]
        folder, lm = self.teacher.folder, self.teacher.model.config
        self.teacher.check_null_condition()
        _check_teacher(folder.name, folder.card)
        self.null_condition, self.guidance_scale = folder.null_condition, folder.guidance_scale
        config = config.copy()
        config.model, config.pattern = {"kind": "token_lm", **asdict(lm)}, folder.config.pattern
        super().__init__(config)
        self.teacher.check_store(self.store.info)
        self.model.load_state_dict(self.teacher.model.state_dict())
        self.replaced = load_text_encoder(folder.source("text"))
        check_same("text", self.replaced.fingerprint, self.store.info)
        asked = config.text_student
        source = self.replaced if asked.encoder is None else load_text_encoder(asked.encoder)
        self.max_tokens = min(source.max_tokens, self.replaced.max_tokens)
        self.encoder, self.tokenizer = self._student(source)
        self.modules = {"model": self.encoder, "lm": self.model}
        self.joint_step: int | None = asked.joint_step
        self._mean_square = self._measured()

    def loader(self, split: str, batch_size: int, rank: int, world_size: int) -> "CaptionLoader":
        codes = super().loader(split, batch_size, rank, world_size)
        return CaptionLoader(codes, self.tokenizer, self.max_tokens, self.replaced)

    def counts(self, batch: Batch) -> Tensor:
        """Valid positions by codebook, the number of items and that of the student's text tokens, [K + 2]."""
        return torch.cat([super().counts(batch), batch["read"].mask.sum()[None].float()])

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        """`text`, the square distance of the projected states in units of the teacher's mean square; later also
        `cross_entropy`, each `codebook_k`, and `kl` from what the teacher says of the same codes."""
        controls = self.controls.dropped(self.controls.of(batch)) if self._is_joint(step) else None
        return {"model": self._named(trained_modules, batch, counts, controls)}

    def validation(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> Losses:
        """All of them from the first step on, with neither tempo nor melody withheld."""
        return self._named(trained_modules, batch, counts, self.controls.of(batch))

    def work(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Of the phase that the step is in; the teacher has no backward pass, so its FLOPs count a third."""
        _, seconds, of_lm = super().work(batch, step)
        flops = float(self.encoder.flops(batch["read"].mask.numel()))
        if not self._is_joint(step):
            return 0.0, seconds, flops
        return float(batch["frame_mask"].sum()) * self.n_codebooks, seconds, flops + of_lm * (1 + 1 / 3)

    def samples(self, step: int) -> list[Sample]:
        """As of a language model that reads the student."""
        self._text_encoder = TextEncoder("student", self.encoder, self.tokenizer, "", self.max_tokens)
        return super().samples(step)

    def facts(self) -> dict[str, Any]:
        """With the teacher, the licences of whose data are the student's too, and what the export builds them from."""
        facts, folder = super().facts(), self.teacher.folder
        told = {key: folder.config[key] for key in ("task", "pattern", "distill") if key in folder.config}
        if told.get("distill"):
            told["distill"] = {**told["distill"], "cache": None}  # a path of this machine
        blueprint = {
            "lm": OmegaConf.to_container(OmegaConf.create(told | {"model": self.config.model})),
            "encoder": describe(self.encoder, self.tokenizer),
        }
        licences = (folder.licences or {}) | facts["licences"]
        text = facts["text"] | {"null_condition": folder.null_condition}
        return facts | {
            "licences": licences, "text": text, "teacher": self.teacher.facts(), "blueprint": blueprint,
        }  # fmt: skip

    def _is_joint(self, step: int) -> bool:
        """Whether the language model learns along."""
        return self.joint_step is not None and step >= self.joint_step

    def _named(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, controls: Controls | None) -> Losses:
        """The losses of the student, and with wishes those of the language model that reads it."""
        read = batch["read"]
        states = trained_modules["model"](read.input_ids, read.mask).last_hidden_state.float()  # [b, L, E]
        named = {"text": self._distance(states, read) / self._mean_square / counts[-1]}
        return named if controls is None else named | self._language(trained_modules["lm"], states, batch, counts[:-1], controls)

    def _distance(self, states: Tensor, read: "ReadCaptions") -> Tensor:
        """Square distance of projected states [b, L, E], summed over real tokens."""
        return (self._projected(states, read.mask) - self._projected(read.targets, read.mask)).square().sum()

    def _projected(self, states: Tensor, mask: Tensor) -> Tensor:
        """As the teacher's language model projects them, 0 at padding: [b, L, E] -> [b, L, D]."""
        return self.teacher.model.text(TextCondition(states, mask)).tokens

    def _language(self, lm: nn.Module, states: Tensor, batch: Batch, counts: Tensor, controls: Controls) -> Losses:
        given = self._prepare_batch(batch, controls)
        embeddings = apply_null_condition(self.null_condition, TextCondition(states, batch["read"].mask), batch["captions"])
        logits = lm(given.codes, embeddings, controls=given.controls)
        named = self._code_losses(logits, given, counts)
        if self.config.losses.kl:
            answer = target(self.teacher(given.codes, self._text(batch), given.controls)[0])
            each = divergence(student_log_q(logits[..., : self.codebook_size], answer), answer.log_p)  # [b, K, S]
            named["kl"] = self._over_codebooks(each.masked_fill(~given.real, 0).sum((0, 2)), counts)
        return named

    def _student(self, source: TextEncoder) -> tuple[StudentEncoder, Any]:
        """The student where it starts, and its tokenizer."""
        asked = self.config.text_student
        layers = None
        if asked.n_layers is not None:
            layers = layer_map("even", asked.n_layers, source.model.config.num_hidden_layers)
        shape = StudentShape(layers, asked.d_model, asked.d_ff, self.max_tokens)
        captions = None
        if asked.trim:
            captions = {text for row in self.store.indices("train") for text in self.store.captions(int(row))}
        return build_student(source.model, source.tokenizer, self.replaced.dim, shape, captions)

    @torch.no_grad()
    def _measured(self) -> float:
        """The mean square of the projected text over its real tokens, of the first batches."""
        loader = self.loader("train", self.config.data.batch_size, 0, 1)
        batches = [loader.batch(n)["text"] for n in range(_CALIBRATION)]
        total = sum(self._projected(*text).square().sum().item() for text in batches)
        return total / sum(text.mask.sum().item() for text in batches)


class ReadCaptions(NamedTuple):
    """Captions as the student reads them, padded behind, and what its states are to be behind the projection.

    input_ids: int64 [b, L]. mask: bool [b, L], True where a token is real. targets: [b, L, E].
    """

    input_ids: Tensor
    mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "ReadCaptions":
        return ReadCaptions(*(part.to(device) for part in self))


class CaptionLoader:
    """The batches of a `CodesLoader` and, as `read`, their captions with the states of the encoder to be replaced,
    which the store holds, brought to the student's tokens."""

    def __init__(self, codes: CodesLoader, tokenizer: Any, max_tokens: int, replaced: TextEncoder) -> None:
        self.codes, self.steps_per_epoch = codes, codes.steps_per_epoch
        self.student = copy.deepcopy(tokenizer), max_tokens  # copies: a tokenizer serves one thread
        self.replaced = copy.deepcopy(replaced.tokenizer), replaced.max_tokens

    def batch(self, n: int) -> Batch:
        batch = self.codes.batch(n)
        student, replaced = (cut(each, batch["captions"], most) for each, most in (self.student, self.replaced))
        states = [rows[mask] for rows, mask in zip(*batch["text"], strict=True)]
        targets = [_spread(*parts) for parts in zip(student, replaced, states, strict=True)]
        ids = [torch.tensor(pieces.ids) for pieces in student]
        real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
        padding = self.student[0].pad_token_id
        padded = pad_sequence(ids, True, padding), pad_sequence(real, True), pad_sequence(targets, True)
        return batch | {"read": ReadCaptions(*padded)}

    def iterate(self, start: int) -> Iterator[Batch]:
        return prefetched(self.batch, start, 2)


def _spread(student: TokenizedCaption, replaced: TokenizedCaption, states: Tensor) -> Tensor:
    """Token states [L', E] of the one tokenizer at the tokens of the other, [L, E]."""
    if len(states) != len(replaced.ids):
        raise UserError(
            f"the store holds {len(states)} token states of a caption with {len(replaced.ids)} tokens: prepare it again"
        )
    return align(student, replaced) @ states


def _check_settings(config: DictConfig) -> None:
    if config.init:
        raise UserError(
            f"init={config.init} has no place here, a text student and its language model start from "
            "text_student.encoder and teacher: set init=null and name those"
        )
    asked, steps = config.text_student, config.train.steps
    check_least(config, {f"losses.{name}": 0 for name in LOSSES})
    least = {"n_layers": 1, "d_model": 1, "d_ff": 1, "joint_step": 0}  # or null
    check_least(config, {f"text_student.{name}": n for name, n in least.items() if asked[name] is not None})
    if asked.joint_step is not None and asked.joint_step >= steps:
        raise UserError(
            f"text_student.joint_step={asked.joint_step} is never reached with train.steps={steps}: give fewer, or null"
        )
    if not config.losses.text:
        raise UserError("losses.text=0 leaves the text student nothing to learn from: give it a weight")
    if config.losses.tags:
        raise UserError("losses.tags has no tag head in a distillation: set losses.tags=0")


def _check_teacher(name: str, card: dict[str, Any]) -> None:
    if "weights" in card:
        raise UserError(f"the weights of the teacher {name} are {card['weights']}: give the one it was made from")
