"""Distillation of a codec's decoder: a small decoder learns to make audio of the codes that its teacher gives.

Shapes: b items of a micro-batch, S samples, K codebooks, T frames.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ssmttm.codecs import TINY_FOLDER, Codec, CodecOutput, StudentCodec, load_codec
from ssmttm.codecs.folder import licences_of
from ssmttm.codecs.students.codec import DECODERS
from ssmttm.distill.codec.matching import StageProjections, matched_stages, traced_outputs
from ssmttm.distill.codec.transfer import transfer_decoder
from ssmttm.errors import UserError
from ssmttm.training.tasks.base import Batch, Losses
from ssmttm.training.tasks.codec import CodecTask, count_flops

_CALIBRATION = 4  # batches by which the activity of channels is measured and the projections are fitted


class CodecDistillTask(CodecTask):
    """A `StudentCodec` learns to decode its teacher's codes of crops of a store's audio: to give the crops back, to
    please the discriminator, and to compute at its stages (`losses.decoder`) what its teacher computes at its own.

    Args:
        config: as of `CodecTask` with `codec_student` instead of `codec`; `teacher`, what `load_codec` takes.

    Raises:
        UserError: no teacher, or none that is a codec; a student that cannot be, or not with its teacher's weights.
    """

    codec: StudentCodec

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        settings = config.codec_student
        if config.init and settings.transfer:
            raise UserError("init and codec_student.transfer both say where the student starts: leave one of them out")
        matched = bool(config.losses.decoder)
        shown = self._calibration() if matched or settings.transfer else []
        self.transferred = transfer_decoder(self.teacher, self.codec, shown) if settings.transfer else []
        self.stages: tuple[list[nn.Module], list[nn.Module]] | None = None  # of the student, and as many of the teacher
        if matched:
            self.stages = self.codec.decoder_stages(), self.teacher.decoder_stages()
            self.modules["projections"] = self._match_stages(torch.cat(shown))

    @property
    def encoder(self) -> Codec:
        return self.teacher

    def build(self, config: DictConfig) -> StudentCodec:
        if not config.teacher:
            raise UserError("teacher is not set: give a codec, such as teacher=tiny, or its folder")
        self.teacher = load_codec(config.teacher).requires_grad_(False)
        return StudentCodec.of(self.teacher, decoder_settings(config.codec_student, self.teacher))

    def reconstruct(self, model: nn.Module, wav: Tensor) -> CodecOutput:
        """What the wrapped student makes of the teacher's codes."""
        output = model(self.teacher.to(wav.device).encode(wav))
        return output._replace(audio=output.audio[..., : wav.shape[-1]])

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        if self.stages is None:
            return super().losses(trained_modules, batch, counts, step)
        with traced_outputs(self.stages[0]) as ours:
            output = self.reconstruct(trained_modules["model"], batch["audio"])
        named = self.losses_of(output, trained_modules, batch, counts, step)
        distances = trained_modules["projections"](ours, self._teachers(output.codes))  # [b]
        named["model"]["decoder"] = distances.sum() / counts[0]
        return named

    def after_step(self, step: int) -> dict[str, float]:
        """The codebooks are the teacher's: none is revived."""
        return {}

    def flops_per_item(self) -> float:
        """Of the student; those of the teacher count a third, as it has no backward pass."""
        codes = self.teacher.encode(torch.zeros(1, 1, self.samples_per_item))
        teacher = count_flops(lambda: self.teacher.encode(torch.zeros(1, 1, self.samples_per_item)))
        if self.config.losses.decoder:
            teacher += count_flops(lambda: self.teacher.decode(codes))
        return self.codec.decoder.flops(codes.shape[-1]) + teacher / 3

    def facts(self) -> dict[str, Any]:
        """With the teacher, whose codes these are and the licences of whose data are the student's too, and with what
        an export needs to build the student again.

        Raises:
            UserError: the weights that the student has been given were made for other codebooks.
        """
        self.codec.check_codebooks(self.teacher)
        facts, teacher = super().facts(), self.codec.config
        codec = {"name": teacher.teacher, "fingerprint": teacher.fingerprint}
        folder = TINY_FOLDER if self.config.teacher == "tiny" else Path(self.config.teacher)
        return facts | {
            "codec": codec,
            "licences": licences_of(folder) | facts["licences"],
            "teacher": codec | {"transferred": len(self.transferred)},
            "student": asdict(self.codec.config),
        }

    def _teachers(self, codes: Tensor) -> list[Tensor]:
        """What comes out of the teacher's stages for codes [b, K, T], [b, T', W] each."""
        with traced_outputs(self.stages[1]) as theirs:
            self.teacher.decode(codes)
        return theirs

    def _calibration(self) -> list[Tensor]:
        """Codes [B, K, T] of the first training batches, the same on every rank."""
        loader = self.loader("train", self.config.data.batch_size, 0, 1)
        return [self.teacher.encode(loader.batch(n)["audio"]) for n in range(_CALIBRATION)]

    def _match_stages(self, codes: Tensor) -> StageProjections:
        """Keep those of the teacher's stages that the student's answer to, and see how the latter map to them."""
        if not self.stages[1]:
            raise UserError(f"the decoder of {self.teacher.name} has no stages to compare with: set losses.decoder=0")
        with torch.no_grad(), traced_outputs(self.stages[0]) as ours:
            self.codec(codes)
        theirs = self._teachers(codes)
        chosen = matched_stages(ours, theirs)
        self.stages = self.stages[0], [self.stages[1][index] for index in chosen]
        return StageProjections.fitted(ours, [theirs[index] for index in chosen])


def decoder_settings(settings: DictConfig, teacher: Codec) -> dict[str, Any]:
    """`StudentConfig.decoder` from the config's `codec_student`, of whose keys each kind of decoder has its own.

    Raises:
        UserError: a convolutional student has no ratios, and its teacher has none to take over.
    """
    given = OmegaConf.to_container(settings)
    if given["kind"] not in DECODERS:
        raise UserError(f"codec_student.kind={given['kind']} is unknown: there are {', '.join(DECODERS)}")
    chosen = {"kind": given["kind"]} | {field.name: given[field.name] for field in fields(DECODERS[given["kind"]][1])}
    if given["kind"] == "conv" and chosen["ratios"] is None:
        of_teacher = getattr(getattr(getattr(teacher, "model", None), "config", None), "upsampling_ratios", None)
        if of_teacher is None:
            raise UserError(
                f"codec_student.ratios is not set and {teacher.name} has none: give strides whose product is "
                f"{teacher.hop_length}"
            )
        chosen["ratios"] = list(of_teacher)
    return chosen
