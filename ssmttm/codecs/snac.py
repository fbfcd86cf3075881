"""SNAC (arXiv 2410.14411) through the package snac: residual codes whose levels have different frame rates.

The codes are a plain [B, K, T] at the rate of the coarsest level: a level of n times that rate is n codebooks, in the
order of time, after those of the coarser levels. Levels of strides 8, 4, 2, 1 are 1 + 2 + 4 + 8 codebooks, and every
pattern applies. Shapes: N levels, F frames of the finest level.
"""

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ssmttm.codecs.base import Codec
from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, with_commit

PREFIX = "snac"
_NOISE_SEED = 0
_NOISE_LOCK = threading.Lock()  # the noise comes from the process's generator


class SnacCodec(Codec):
    """A SNAC of the package, mono.

    Its decoder adds noise, which the package draws anew at each call; here it is the same for every clip, so that equal
    codes give equal audio. Its attention is within windows of frames, so it is used on whole clips (`context` is None);
    where T is not a multiple of the window, the last frame is repeated up to one, and cut off again.
    """

    similarity = "cosine"
    context = None

    def __init__(self, model: Any, name: str = PREFIX) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.counts = codebooks_of_levels(model.vq_strides)
        self.sample_rate = int(model.sampling_rate)
        self.hop_length = int(model.hop_length) * model.vq_strides[0]
        self.n_codebooks, self.codebook_size = sum(self.counts), int(model.codebook_size)

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def keep_codebooks(self, n: int) -> Codec:
        """As `Codec.keep_codebooks`, for whole levels."""
        sums = [sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        if n not in sums:
            raise UserError(f"codec {self.name} has levels: n_codebooks must be one of {', '.join(map(str, sums))}")
        return super().keep_codebooks(n)

    def codebook_vectors(self) -> Tensor:
        books = [quantiser.codebook.weight for quantiser in self.model.quantizer.quantizers]
        return torch.stack([book for book, count in zip(books, self.counts, strict=True) for _ in range(count)])

    def _encode(self, wav: Tensor) -> Tensor:
        codes = levels_to_codes(self.model.encode(wav), self.counts)  # [B, K, T or more], padded to whole windows
        return codes[..., : wav.shape[-1] // self.hop_length]

    def _decode(self, codes: Tensor) -> Tensor:
        samples = codes.shape[-1] * self.hop_length
        stride = self.model.vq_strides[0]
        window = self.model.attn_window_size or 1  # in frames of the finest level
        codes = F.pad(codes.double(), (0, -codes.shape[-1] % (math.lcm(stride, window) // stride)), "replicate").long()
        hidden = torch.zeros((), device=codes.device)
        for quantiser, level in zip(self.model.quantizer.quantizers, codes_to_levels(codes, self.counts), strict=False):
            vectors = quantiser.out_proj(quantiser.decode_code(level))  # [B, D, F / stride]
            hidden = hidden + vectors.repeat_interleave(quantiser.stride, dim=-1)  # [B, D, F]
        decoded = []
        devices = [codes.device] if codes.device.type == "cuda" else []
        with _NOISE_LOCK, torch.random.fork_rng(devices):
            for item in hidden:
                torch.manual_seed(_NOISE_SEED)
                decoded.append(self.model.decoder(item[None])[..., :samples])
        return torch.cat(decoded)


def codebooks_of_levels(strides: Sequence[int]) -> tuple[int, ...]:
    """The number of codebooks of each level, from the strides of the levels over the finest frames.

    Raises:
        UserError: the strides are not multiples of each other from the coarsest to the finest.
    """
    counts = [strides[0] / stride for stride in strides]
    if any(count != int(count) or count < 1 for count in counts) or sorted(counts) != counts:
        raise UserError(f"levels of strides {list(strides)} cannot share a frame: each must divide the first")
    return tuple(map(int, counts))


def levels_to_codes(levels: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Codes of each level, N x [B, T * count] -> [B, K, T], K = sum of the counts."""
    return torch.cat([level.unflatten(1, (-1, n)).transpose(1, 2) for level, n in zip(levels, counts, strict=True)], 1)


def codes_to_levels(codes: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The inverse of `levels_to_codes`, also of the codebooks of the first levels only."""
    levels, first = [], 0
    for n in counts:
        if first < codes.shape[1]:
            levels.append(codes[:, first : first + n].transpose(1, 2).flatten(1))
            first += n
    return levels


def load_snac(name: str, revision: str | None = None) -> SnacCodec:
    """A codec in eval mode from a folder, or a hub name such as hubertsiuzdak/snac_32khz.

    Raises:
        UserError: the package snac is missing, there is no such folder or hub name, or it holds no SNAC.
    """
    try:
        from snac import SNAC
    except ImportError as error:
        raise UserError(f"codec {PREFIX}:{name} needs the package snac: pip install snac") from error
    folder = checkpoint_folder(name, ("config.json", "*.bin", "*.safetensors"), "codec", revision=revision)
    try:
        model = SNAC(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        safe = folder / "model.safetensors"
        weights = load_file(safe) if safe.is_file() else torch.load(
            folder / "pytorch_model.bin", map_location="cpu", weights_only=True
        )  # fmt: skip
        model.load_state_dict(weights)
    except (OSError, ValueError, TypeError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{name} holds no SNAC ({reason}): give config.json and its weights") from error
    return SnacCodec(model, f"{PREFIX}:{name if Path(name).is_dir() else with_commit(name, folder)}").eval()
