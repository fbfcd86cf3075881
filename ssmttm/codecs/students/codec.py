"""StudentCodec: a small decoder for the codes of a given codec."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmttm.codecs.base import Codec, CodecOutput, weights_fingerprint
from ssmttm.codecs.folder import read_folder, write_folder
from ssmttm.codecs.students.decoders import ConvConfig, ConvDecoder, SpectralConfig, SpectralDecoder
from ssmttm.errors import UserError

MODEL_TYPE = "ssmttm_student_codec"
DECODERS = {"spectral": (SpectralDecoder, SpectralConfig), "conv": (ConvDecoder, ConvConfig)}


@dataclass(frozen=True)
class StudentConfig:
    """Whose codes a student decodes, and with what.

    Attributes:
        teacher: the codec's name.
        fingerprint: the codec's.
        codebook_dim: c.
        decoder: `kind` ("spectral" or "conv") and the fields of its config, see `ssmttm.codecs.students.decoders`.
    """

    teacher: str
    fingerprint: str
    similarity: Literal["cosine", "euclidean"]
    sample_rate: int
    hop_length: int
    n_codebooks: int
    codebook_size: int
    codebook_dim: int
    decoder: dict[str, Any]


class StudentCodec(Codec):
    """A decoder of another codec's codes; it does not encode.

    `fingerprint` is that of the codec whose codes it speaks, so that it stands in for it wherever codes of that codec
    are decoded; `decoder_fingerprint` is that of its own weights.

    Raises:
        UserError: a decoder of no known kind, with a field that is not known or that cannot be.
    """

    codebooks: Tensor

    def __init__(self, config: StudentConfig, name: str = "student") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.n_codebooks, self.codebook_size = config.n_codebooks, config.codebook_size
        self.similarity = config.similarity
        sizes = config.n_codebooks, config.codebook_dim
        self.register_buffer("codebooks", torch.zeros(sizes[0], config.codebook_size, sizes[1]))
        self.decoder = _build(config.decoder, *sizes, config.hop_length)
        self.context = self.decoder.context

    @classmethod
    def of(cls, teacher: Codec, decoder: Mapping[str, Any], name: str = "student") -> "StudentCodec":
        """A student of a codec with the codec's codebooks and a decoder of random weights.

        Args:
            decoder: as `StudentConfig.decoder`.

        Raises:
            UserError: the codec is a student itself, or the decoder cannot be.
        """
        if isinstance(teacher, StudentCodec):
            raise UserError(f"{teacher.name} is a student, it cannot encode: give its codec, {teacher.config.teacher}")
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
        """That of the codec whose codes it speaks."""
        return self.config.fingerprint

    @property
    def decoder_fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of its own weights."""
        return weights_fingerprint(self.weights())

    def decoder_stages(self) -> list[nn.Module]:
        return list(self.decoder.stages)

    def codebook_vectors(self) -> Tensor:
        return self.codebooks

    def check_codebooks(self, teacher: Codec) -> None:
        """Raises UserError unless its codebooks are the teacher's, to the rounding to float16."""
        books = teacher.codebook_vectors()[: len(self.codebooks)].to(self.codebooks)
        if books.shape != self.codebooks.shape or (books - self.codebooks).abs().max() > 1e-3 * books.abs().max():
            raise UserError(
                f"these weights were made for other codebooks than those of the teacher {teacher.name}: give the codec "
                "that they learnt from as teacher=, or start without them"
            )

    def _encode(self, wav: Tensor) -> Tensor:
        raise UserError(f"codec {self.name} only decodes: encode with {self.config.teacher}, whose codes it speaks")

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self._look_up(codes))

    def save(self, folder: Path | str, half: bool = True) -> None:
        """Write config.json and model.safetensors (float16 if `half`) into a folder; `load` gives float32 back."""
        write_folder(folder, MODEL_TYPE, asdict(self.config), self.weights(), half)

    @classmethod
    def load(cls, folder: Path | str, name: str | None = None) -> "StudentCodec":
        """Read what `save` wrote, in eval mode. A folder that lacks it or does not fit raises UserError."""
        return read_folder(folder, lambda config: cls(StudentConfig(**config), name or Path(folder).name))


def _build(decoder: Mapping[str, Any], n_codebooks: int, codebook_dim: int, hop_length: int) -> Any:
    fields = dict(decoder)
    kind = fields.pop("kind", None)
    if kind not in DECODERS:
        raise UserError(f"decoder kind {kind!r} is none of {', '.join(DECODERS)}")
    decoder_class, config_class = DECODERS[kind]
    try:
        config = config_class(**fields)
    except TypeError as error:
        raise UserError(f"decoder kind {kind}: {error}") from error
    return decoder_class(config, n_codebooks, codebook_dim, hop_length)
