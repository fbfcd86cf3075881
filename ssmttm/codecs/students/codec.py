"""StudentCodec: a small decoder for the codes of a teacher codec."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmttm.codecs.base import Codec, CodecOutput
from ssmttm.codecs.folder import read_codec_folder, write_codec_folder
from ssmttm.codecs.students.decoders import ConvConfig, ConvDecoder, SpectralConfig, SpectralDecoder
from ssmttm.errors import UserError

MODEL_TYPE = "ssmttm_student_codec"
DECODERS = {"spectral": (SpectralDecoder, SpectralConfig), "conv": (ConvDecoder, ConvConfig)}


@dataclass(frozen=True)
class StudentConfig:
    """The teacher codec, its codebooks' sizes, and the student's decoder: `kind` ("spectral" or "conv") and the fields
    of its config (`ssmttm.codecs.students.decoders`)."""

    teacher: str  # name of the codec
    fingerprint: str  # of the teacher
    similarity: Literal["cosine", "euclidean"]
    sample_rate: int
    hop_length: int
    n_codebooks: int
    codebook_size: int
    codebook_dim: int
    decoder: dict[str, Any]


class StudentCodec(Codec):
    """Decodes the codes of its teacher; it does not encode.

    `fingerprint` is the teacher's, so that a student can replace it wherever codes are decoded; `decoder_fingerprint`
    is of its own weights.

    Raises:
        UserError: unknown decoder kind or field, or an invalid value.
    """

    codebooks: Tensor

    def __init__(self, config: StudentConfig, name: str = "student") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.n_codebooks, self.codebook_size = config.n_codebooks, config.codebook_size
        self.similarity = config.similarity
        codebooks = torch.zeros(config.n_codebooks, config.codebook_size, config.codebook_dim)
        self.register_buffer("codebooks", codebooks)
        self.decoder = _build(config.decoder, config.n_codebooks, config.codebook_dim, config.hop_length)
        self.context = self.decoder.context

    @classmethod
    def from_teacher(cls, teacher: Codec, decoder: Mapping[str, Any], name: str = "student") -> "StudentCodec":
        """A student with the teacher's codebooks and a decoder (as `StudentConfig.decoder`) with random weights.

        Raises:
            UserError: the teacher is a student itself, or the decoder is invalid.
        """
        if isinstance(teacher, StudentCodec):
            raise UserError(f"{teacher.name} is a student and cannot encode: use its teacher, {teacher.config.teacher}")
        books = teacher.codebook_vectors()[: teacher.n_codebooks].detach()  # [K, V, c]
        config = StudentConfig(
            teacher.name, teacher.fingerprint, teacher.similarity, teacher.sample_rate, teacher.hop_length,
            *books.shape, dict(decoder),
        )  # fmt: skip
        student = cls(config, name)
        student.codebooks.copy_(books)
        return student

    def forward(self, codes: Tensor) -> CodecOutput:
        """Codes [B, K, T] -> audio [B, 1, T * hop_length], with gradients."""
        return CodecOutput(self.decoder(self.to_latents(codes)), codes, {})

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint."""
        return self.config.fingerprint

    @property
    def decoder_fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the student's weights."""
        return self._hashed_weights()

    def decoder_stages(self) -> list[nn.Module]:
        return list(self.decoder.stages)

    def codebook_vectors(self) -> Tensor:
        return self.codebooks

    def check_codebooks(self, teacher: Codec) -> None:
        """Raises UserError unless the codebooks equal the teacher's up to float16 rounding."""
        books = teacher.codebook_vectors()[: len(self.codebooks)].to(self.codebooks)
        if books.shape != self.codebooks.shape or (books - self.codebooks).abs().max() > 1e-3 * books.abs().max():
            raise UserError(
                f"these weights were trained for other codebooks than those of the teacher {teacher.name}: set teacher "
                "to the codec they were trained with, or do not load them"
            )

    def _encode(self, wav: Tensor) -> Tensor:
        raise UserError(f"codec {self.name} only decodes: encode with its teacher, {self.config.teacher}")

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self._look_up(codes))

    def save(self, folder: Path | str, half: bool = True) -> None:
        """Write config.json and model.safetensors (float16 if `half`) to a folder."""
        write_codec_folder(folder, MODEL_TYPE, asdict(self.config), self.weights(), half)

    @classmethod
    def load(cls, folder: Path | str, name: str | None = None) -> "StudentCodec":
        """Load a folder written by `save`, in float32 and eval mode. Raises UserError if it is missing or damaged."""
        return read_codec_folder(folder, lambda config: cls(StudentConfig(**config), name or Path(folder).name))


def _build(decoder: Mapping[str, Any], n_codebooks: int, codebook_dim: int, hop_length: int) -> Any:
    fields = dict(decoder)
    kind = fields.pop("kind", None)
    if kind not in DECODERS:
        raise UserError(f"unknown decoder kind {kind!r}: choose from {', '.join(DECODERS)}")
    decoder_class, config_class = DECODERS[kind]
    try:
        config = config_class(**fields)
    except TypeError as error:
        raise UserError(f"decoder kind {kind}: {error}") from error
    return decoder_class(config, n_codebooks, codebook_dim, hop_length)
