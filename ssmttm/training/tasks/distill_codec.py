"""Distillation of a codec's decoder into a smaller one.

Shapes: b items of a micro-batch, S samples, K codebooks, T frames.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ssmttm.codecs import EMBEDDED, Codec, CodecOutput, StudentCodec, load_codec
from ssmttm.codecs.students.codec import DECODERS
from ssmttm.distill.codec.matching import StageProjections, matched_stages, traced_outputs
from ssmttm.distill.codec.transfer import transfer_decoder
from ssmttm.errors import UserError
from ssmttm.model_folder import training_licences
from ssmttm.training.tasks.base import Batch, Losses
from ssmttm.training.tasks.codec import CodecTask, count_flops

_CALIBRATION_BATCHES = 4


class CodecDistillTask(CodecTask):
    """A `StudentCodec` learns to decode its teacher's codes of audio crops with the losses of a codec, the adversarial
    loss, and `decoder`, the distance of its decoder stages from its teacher's. Of the config it reads `teacher`, an
    argument of `load_codec`, and `codec_student` instead of `codec`."""

    codec: StudentCodec

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        transfer, match_stages = config.codec_student.transfer, bool(config.losses.decoder)
        if config.init and transfer:
            raise UserError("init and codec_student.transfer both initialise the student: set only one of them")
        codes = self._calibration_codes() if match_stages or transfer else []
        self.transferred = transfer_decoder(self.teacher, self.codec, codes) if transfer else []
        self.student_stages: list[nn.Module] = []  # matched, if losses.decoder is on
        self.teacher_stages: list[nn.Module] = []
        if match_stages:
            self.modules["projections"] = self._match_stages(torch.cat(codes))

    @property
    def encoder(self) -> Codec:
        return self.teacher

    def build(self, config: DictConfig) -> StudentCodec:
        if not config.teacher:
            raise UserError("teacher is not set: set it to a codec or its folder, as in teacher=tiny")
        self.teacher = load_codec(config.teacher).requires_grad_(False)
        return StudentCodec.from_teacher(self.teacher, decoder_settings(config.codec_student, self.teacher))

    def reconstruct(self, model: nn.Module, wav: Tensor) -> CodecOutput:
        """The student's decoding of the teacher's codes."""
        output = model(self.teacher.to(wav.device).encode(wav))
        return output._replace(audio=output.audio[..., : wav.shape[-1]])

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Batch, denominators: Tensor, step: int
    ) -> dict[str, Losses]:
        if not self.student_stages:
            return super().losses(modules, batch, denominators, step)
        with traced_outputs(self.student_stages) as outputs:
            output = self.reconstruct(modules["model"], batch["audio"])
        losses = self.output_losses(output, modules, batch, denominators, step)
        distances = modules["projections"](outputs, self._teacher_outputs(output.codes))  # [b]
        losses["model"]["decoder"] = distances.sum() / denominators[0]
        return losses

    def restart_codes(self, step: int) -> dict[str, Tensor]:
        """The codebooks are the teacher's: no code is restarted."""
        return {}

    def flops_per_item(self) -> float:
        """Of the student; the teacher's FLOPs count a third, as it has no backward pass."""
        codes = self.teacher.encode(torch.zeros(1, 1, self.samples_per_item))
        teacher = count_flops(lambda: self.teacher.encode(torch.zeros(1, 1, self.samples_per_item)))
        if self.config.losses.decoder:
            teacher += count_flops(lambda: self.teacher.decode(codes))
        return self.codec.decoder.flops(codes.shape[-1]) + teacher / 3

    def metadata(self) -> dict[str, Any]:
        """With the teacher, the licences of its data, and the config that the export rebuilds the student from."""
        self.codec.check_codebooks(self.teacher)
        metadata, config = super().metadata(), self.codec.config
        codec = {"name": config.teacher, "fingerprint": config.fingerprint}
        folder = EMBEDDED.get(self.config.teacher) or Path(self.config.teacher)
        return metadata | {
            "codec": codec,
            "licences": training_licences(folder) | metadata["licences"],
            "teacher": codec | {"transferred": len(self.transferred)},
            "student": asdict(config),
        }

    def _teacher_outputs(self, codes: Tensor) -> list[Tensor]:
        """Outputs [b, T', W] of the teacher's stages for codes [b, K, T]."""
        with traced_outputs(self.teacher_stages) as outputs:
            self.teacher.decode(codes)
        return outputs

    def _calibration_codes(self) -> list[Tensor]:
        """Codes [B, K, T] of the first training batches, equal on every rank."""
        loader = self.loader("train", self.config.data.batch_size, 0, 1)
        return [self.teacher.encode(loader.batch(n)["audio"]) for n in range(_CALIBRATION_BATCHES)]

    def _match_stages(self, codes: Tensor) -> StageProjections:
        """Select the teacher stage for each student stage and fit the projections."""
        self.student_stages, self.teacher_stages = self.codec.decoder_stages(), self.teacher.decoder_stages()
        if not self.teacher_stages:
            raise UserError(f"the decoder of {self.teacher.name} has no stages to match: set losses.decoder=0")
        with torch.no_grad(), traced_outputs(self.student_stages) as ours:
            self.codec(codes)
        theirs = self._teacher_outputs(codes)
        matched = matched_stages(ours, theirs)
        self.teacher_stages = [self.teacher_stages[index] for index in matched]
        return StageProjections.fitted(ours, [theirs[index] for index in matched])


def decoder_settings(settings: DictConfig, teacher: Codec) -> dict[str, Any]:
    """`StudentConfig.decoder` from the config's `codec_student`: the keys of its kind of decoder."""
    values: Any = OmegaConf.to_container(settings)
    kind = values["kind"]
    if kind not in DECODERS:
        raise UserError(f"unknown codec_student.kind={kind}: choose one of {', '.join(DECODERS)}")
    if kind == "conv" and values["ratios"] is None:
        ratios = getattr(getattr(getattr(teacher, "model", None), "config", None), "upsampling_ratios", None)
        if ratios is None:
            raise UserError(
                f"codec_student.ratios is not set and {teacher.name} has none: set strides whose product is "
                f"{teacher.hop_length}"
            )
        values["ratios"] = list(ratios)
    return {"kind": kind} | {field.name: values[field.name] for field in fields(DECODERS[kind][1])}
