"""DAC, EnCodec, Mimi and X-Codec through transformers' classes, as `Codec`s."""

import math
from pathlib import Path

import torch
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    XcodecConfig,
    XcodecModel,
)
from transformers.models.encodec.modeling_encodec import EncodecLSTM, EncodecResnetBlock

from ssmttm.codecs.base import Codec, CodecOutput, no_autocast
from ssmttm.codecs.quantiser import reseed, unused_entries
from ssmttm.codecs.receptive_field import upsampling_context
from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, with_commit

_OVERLAP = 2  # frames of two chunks of EnCodec
_LEVEL_RANGE = 102.4  # dB of EnCodec's levels


class TransformersCodec(Codec):
    """Base of the wrappers: the wrapped model is `model`, its weights are the codec's."""

    model: nn.Module

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


class DacCodec(TransformersCodec):
    """A transformers DacModel (DAC, arXiv 2306.06546); it can be trained like `TinyCodec`."""

    similarity = "cosine"
    usage: Tensor

    def __init__(self, model: DacModel, name: str = "dac") -> None:
        super().__init__()
        config = model.config
        self.model, self.name = model, name
        self.sample_rate, self.hop_length = config.sampling_rate, math.prod(config.downsampling_ratios)
        self.n_codebooks, self.codebook_size = config.n_codebooks, config.codebook_size
        self.context = upsampling_context(config.upsampling_ratios)
        self.register_buffer("usage", torch.zeros(config.n_codebooks, config.codebook_size, dtype=torch.int64))

    def forward(self, wav: Tensor) -> CodecOutput:
        """Reconstruct a waveform [B, 1, S], with gradients; in training with quantiser dropout and usage counts."""
        z = self.model.encoder(self.pad(wav))  # [B, D, T]
        with no_autocast(z):
            z, codes, _, commitment, codebook = self.model.quantizer(z.float())
        if self.training:
            for k, used in enumerate(self.usage):
                used += torch.bincount(codes[:, k].flatten(), minlength=self.codebook_size)
        losses = {"codebook": codebook.mean() / codes.shape[1], "commitment": commitment.mean() / codes.shape[1]}
        audio = self._pad_to_frames(self.model.decoder(z), codes.shape[-1])
        return CodecOutput(audio[..., : wav.shape[-1]], codes, losses)

    @torch.no_grad()
    def restart_unused_codes(self, wav: Tensor, min_usage: float = 0.05) -> dict[str, Tensor]:
        """Re-seed unused codebook entries, as `TinyCodec.restart_unused_codes` does."""
        unused = unused_entries(self.usage, min_usage)  # [K, V]
        with no_autocast(wav):
            residual = self.model.encoder(self.pad(wav))  # [B, D, T]
            for layer, rows in zip(self.model.quantizer.quantizers, unused, strict=True):
                pool = rearrange(layer.in_proj(residual), "b c t -> (b t) c")
                reseed(layer.codebook.weight, rows, pool)
                residual = residual - layer(residual)[0]
        self.usage.zero_()
        return {f"model.quantizer.quantizers.{k}.codebook.weight": rows for k, rows in enumerate(unused)}

    def decoder_stages(self) -> list[nn.Module]:
        return list(self.model.decoder.block)

    def codebook_vectors(self) -> Tensor:
        return torch.stack([layer.codebook.weight for layer in self.model.quantizer.quantizers])

    def _encode(self, wav: Tensor) -> Tensor:
        return self.model.encode(wav, n_quantizers=self.n_codebooks).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self._pad_to_frames(self.model.decode(audio_codes=codes).audio_values[:, None], codes.shape[-1])

    def _pad_to_frames(self, wav: Tensor, frames: int) -> Tensor:
        """Pad with zeros to full frames: with odd strides the model's output is a few samples short."""
        return F.pad(wav, (0, frames * self.hop_length - wav.shape[-1]))


class EncodecCodec(TransformersCodec):
    """A transformers EncodecModel (EnCodec, arXiv 2210.13438; MusicGen's codec), mono or stereo.

    The 48 kHz stereo model codes chunks of a second, each divided by its level (RMS). Two things differ from
    transformers, so that codes are a plain [B, K, T] on a regular grid of frames:

    - Chunks overlap by whole frames (_OVERLAP; the model's own 1 % of a chunk is 1.5 frames). A frame in two chunks is
      kept once, as the later chunk codes it; decoded chunks are cross-faded as transformers does.
    - The level of a chunk is codebook 0, repeated over its frames, in steps of 0.1 dB (102.4 dB over all entries).

    Its LSTM has unbounded context, so it does not stream (`context` is None).
    """

    similarity = "euclidean"
    context = None

    def __init__(self, model: EncodecModel, name: str = "encodec") -> None:
        super().__init__()
        config = model.config
        self.model, self.name = model, name
        self.channels, self.normalises = config.audio_channels, config.normalize
        if self.channels not in (1, 2):
            raise UserError(f"codec {name} has {self.channels} channels: only mono and stereo are supported")
        self.sample_rate, self.hop_length = config.sampling_rate, math.prod(config.upsampling_ratios)
        self.n_codebooks, self.codebook_size = config.num_quantizers + self.normalises, config.codebook_size
        self.chunk = None if config.chunk_length is None else config.chunk_length // self.hop_length  # frames
        if self.chunk is not None and self.chunk <= _OVERLAP:
            raise UserError(f"codec {name}: chunks of {self.chunk} frames are too short")

    def decoder_stages(self) -> list[nn.Module]:
        return [layer for layer in self.model.decoder.layers if isinstance(layer, EncodecLSTM | EncodecResnetBlock)]

    def keep_codebooks(self, n: int) -> Codec:
        """As `Codec.keep_codebooks`; a codebook of levels comes first, and is not enough alone."""
        if n <= self.normalises:
            raise UserError(f"codec {self.name} codes levels first: n_codebooks must be at least 2, got {n}")
        return super().keep_codebooks(n)

    def codebook_vectors(self) -> Tensor:
        books = torch.stack([layer.codebook.embed for layer in self.model.quantizer.layers])  # [K, V, c]
        if not self.normalises:
            return books
        ramp = torch.linspace(-1, 1, self.codebook_size, device=books.device).to(books.dtype)
        return torch.cat([ramp[None, :, None].expand(1, -1, books.shape[2]), books])

    def _encode(self, wav: Tensor) -> Tensor:
        n_frames = wav.shape[-1] // self.hop_length
        parts = []
        for start, stop in self._chunks(n_frames):
            kept = stop - start if stop == n_frames else stop - start - _OVERLAP
            codes = self._encode_chunk(wav[..., start * self.hop_length : stop * self.hop_length])
            parts.append(codes[..., :kept])
        return torch.cat(parts, dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        if self.chunk is None:
            return self._decode_chunk(codes)
        chunks = self._chunks(codes.shape[-1])
        decoded = [self._decode_chunk(codes[..., start:stop]) for start, stop in chunks]
        if len(chunks) == 1:
            return decoded[0]
        return self.model._linear_overlap_add(decoded, chunks[1][0] * self.hop_length)

    def _chunks(self, n_frames: int) -> list[tuple[int, int]]:
        """First frame and end of each chunk."""
        if self.chunk is None or n_frames <= self.chunk:
            return [(0, n_frames)]
        stride = self.chunk - _OVERLAP
        return [(start, min(start + self.chunk, n_frames)) for start in range(0, n_frames - _OVERLAP, stride)]

    def _encode_chunk(self, wav: Tensor) -> Tensor:
        """[B, C, t * hop] -> codes [B, K, t]."""
        codes = []
        if self.normalises:
            level = wav.mean(1, keepdim=True).square().mean(-1, keepdim=True).sqrt() + 1e-8  # [B, 1, 1]
            codes.append(self._level_code(level)[..., 0].expand(-1, wav.shape[-1] // self.hop_length))
            wav = wav / level
        residual = self.model.encoder(wav)
        for layer in self.model.quantizer.layers[: self.n_codebooks - self.normalises]:
            codes.append(layer.encode(residual))
            residual = residual - layer.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def _decode_chunk(self, codes: Tensor) -> Tensor:
        """Codes [B, K, t] -> [B, C, t * hop]."""
        if not self.normalises:
            return self.model._decode_frame(codes)
        own = codes[:, 0, : max(1, codes.shape[-1] - _OVERLAP)]  # the last frames may be of the next chunk
        return self.model._decode_frame(codes[:, 1:], self._level(own.median(-1).values))

    def _level_code(self, level: Tensor) -> Tensor:
        """The code of a level: 0 for -102.4 dB, in steps so that the last one is just below 0 dB."""
        steps = (1 + 20 * level.log10() / _LEVEL_RANGE) * self.codebook_size
        return steps.round().long().clamp(0, self.codebook_size - 1)

    def _level(self, code: Tensor) -> Tensor:
        """The level of a code."""
        return 10 ** ((code / self.codebook_size - 1) * _LEVEL_RANGE / 20)


class MimiCodec(TransformersCodec):
    """A transformers MimiModel (Mimi, arXiv 2410.00037); streaming is not supported (`context` is None)."""

    similarity = "euclidean"
    context = None

    def __init__(self, model: MimiModel, name: str = "mimi") -> None:
        super().__init__()
        config = model.config
        if config.audio_channels != 1:
            raise UserError(f"codec {name}: only a mono Mimi is supported")
        self.model, self.name = model, name
        self.sample_rate, self.hop_length = config.sampling_rate, round(config.sampling_rate / config.frame_rate)
        self.n_codebooks, self.codebook_size = config.num_quantizers, config.codebook_size

    def codebook_vectors(self) -> Tensor:
        quantiser = self.model.quantizer
        layers = [
            *quantiser.semantic_residual_vector_quantizer.layers,
            *quantiser.acoustic_residual_vector_quantizer.layers,
        ]
        return torch.stack([layer.codebook.embed for layer in layers])

    def _encode(self, wav: Tensor) -> Tensor:
        return self.model.encode(wav, num_quantizers=self.n_codebooks).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values[..., : codes.shape[-1] * self.hop_length]


class XcodecCodec(TransformersCodec):
    """A transformers XcodecModel (X-Codec, arXiv 2408.17175), mono, whose codes also hold features of a HuBERT.

    Its HuBERT has unbounded context, and its decoder is used on whole clips (`context` is None).
    """

    similarity = "euclidean"
    context = None

    def __init__(self, model: XcodecModel, name: str = "xcodec") -> None:
        super().__init__()
        config = model.config
        self.model, self.name = model, name
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.n_codebooks, self.codebook_size = config.num_quantizers, config.codebook_size

    def codebook_vectors(self) -> Tensor:
        return torch.stack([layer.codebook.embed for layer in self.model.quantizer.quantizers])

    def _encode(self, wav: Tensor) -> Tensor:
        return self.model.encode(wav).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        length = codes.shape[-1] * self.hop_length
        wav = self.model.decode(codes).audio_values[..., :length]
        return F.pad(wav, (0, length - wav.shape[-1]))


CLASSES = {
    "dac": (DacCodec, DacModel, DacConfig),
    "encodec": (EncodecCodec, EncodecModel, EncodecConfig),
    "mimi": (MimiCodec, MimiModel, MimiConfig),
    "xcodec": (XcodecCodec, XcodecModel, XcodecConfig),
}


def from_config(kind: str, fields: dict[str, object]) -> TransformersCodec:
    """A codec with random weights: kind "dac", "encodec", "mimi" or "xcodec", fields of transformers' config class."""
    codec_class, model_class, config_class = CLASSES[kind]
    if kind == "dac" and not {"sampling_rate", "downsampling_ratios"} <= fields.keys():
        raise UserError("codec: kind dac needs sampling_rate and downsampling_ratios (transformers' defaults disagree)")
    try:
        return codec_class(model_class(config_class(**fields)), kind)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"codec kind {kind}: {' '.join(str(error).split())}") from error


def from_folder(folder: Path) -> TransformersCodec:
    """A pretrained codec in eval mode. Raises UserError if the folder holds none."""
    return _load(folder, folder.resolve().name)


def from_hub(name: str, revision: str | None = None) -> TransformersCodec:
    """A pretrained codec in eval mode, whose `name` ends in its commit. Raises UserError if it cannot be fetched."""
    advice = "use the embedded codec `tiny`"
    folder = checkpoint_folder(name, ("config.json", "model*.safetensors*"), "codec", advice, revision)
    return _load(folder, with_commit(name, folder))


def _load(folder: Path, name: str) -> TransformersCodec:
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in CLASSES:
            raise UserError(f"codec {name}: unknown model_type {kind!r}: choose from {', '.join(CLASSES)}")
        codec_class, model_class, _ = CLASSES[kind]
        return codec_class(model_class.from_pretrained(folder), name).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"codec {name} cannot be loaded ({reason}): give a folder with config.json and model.safetensors, or use "
            "the embedded codec `tiny`"
        ) from error
