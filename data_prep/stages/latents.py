"""The stage `latents`: encode the segments of a shard with a VAE, aligned to the frames of their codes.

Shapes: C channels of the audio, c latent channels, T latent frames, S samples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from data_prep.shard_task import Counts
from data_prep.stages.encode import CodecOptions, Windows, encode_all, read_audio
from data_prep.stages.segments import Segments
from ssmttm.data.tensorfile import write_tensors
from ssmttm.errors import UserError

if TYPE_CHECKING:
    from ssmttm.codecs.vae import OobleckVAE

LATENTS_FILE = "latents.safetensors"


@dataclass(frozen=True)
class LatentOptions:
    """A VAE, loaded once per process."""

    name: str  # for `ssmttm.codecs.vae.load_vae`
    windows: Windows  # shape of its input
    device: str  # cpu or cuda
    codec: CodecOptions  # whose frames the latents are aligned to
    sample_rate: int  # of the segments' files, in Hz

    def metadata(self) -> dict[str, Any]:
        """What decides the latents, except for a machine's rounding; as store.json keeps it."""
        vae = _load(self.name, "cpu")
        codec = self.codec.metadata()
        names = ("name", "fingerprint", "sample_rate", "frame_rate", "latent_channels", "channels")
        windows = {"seconds": self.windows.seconds, "margin_seconds": self.windows.margin_seconds, "dtype": "float32"}
        ratio = _frames_per_code(vae, codec["frame_rate"], codec["name"])
        return {name: getattr(vae, name) for name in names} | {"frames_per_code": ratio, "windows": windows}

    def exact_metadata(self) -> dict[str, Any]:
        """Everything that decides the latents."""
        return self.metadata() | {"batch": self.windows.batch, "device": self.device}

    def check_channels(self, channels: int) -> None:
        """Raise UserError unless the VAE takes audio of so many channels."""
        _load(self.name, "cpu").check_channels(channels, f"--latents {self.name}")

    @property
    def vae(self) -> "OobleckVAE":
        """The VAE on its device."""
        return _load(self.name, self.device)

    def n_frames(self, duration: float) -> int:
        """Latent frames of a segment of `duration` seconds: those of all its codes."""
        codec = self.codec.codec
        n_samples = math.ceil(round(duration * self.sample_rate) * codec.sample_rate / self.sample_rate)
        ratio = _frames_per_code(self.vae, codec.frame_rate, codec.name)
        return ratio * -(-n_samples // codec.hop_length)


def latents_shard(options: LatentOptions, segments: Segments, folder: Path) -> Counts:
    """Write `latents` float16 [c, T_total] and `offsets` [n + 1] of the segments, in the order of the rows. Raises
    UserError if a latent is not finite in float16."""
    rows, vae = segments.read(), options.vae

    def wavs() -> Iterator[Tensor]:
        for row, wav in zip(rows, read_audio(segments, rows, vae), strict=True):
            n_samples = options.n_frames(row["duration"]) * vae.hop_length
            yield F.pad(wav, (0, max(0, n_samples - wav.shape[1])))[:, :n_samples]

    encoded: list[np.ndarray] = []
    for row, latents in zip(rows, encode_all(wavs(), vae, options.windows, options.device), strict=True):
        with np.errstate(over="ignore"):
            encoded.append(latents.astype(np.float16))
        if not np.isfinite(encoded[-1]).all():
            raise UserError(
                f"segment {row['id']}: VAE {vae.name} encodes it to NaN or beyond float16: drop that audio, or use "
                "another VAE"
            )
    offsets = np.cumsum([0, *(latents.shape[1] for latents in encoded)], dtype=np.int64)
    joined = np.concatenate([np.empty((vae.latent_channels, 0), np.float16), *encoded], axis=1)
    write_tensors(folder / LATENTS_FILE, {"latents": joined, "offsets": offsets})
    return {"segments": len(rows), "seconds": sum(row["duration"] for row in rows)}


def _frames_per_code(vae: "OobleckVAE", frame_rate: float, codec_name: str) -> int:
    from ssmttm.codecs.vae import frames_per_code

    return frames_per_code(vae.frame_rate, frame_rate, vae.name, codec_name)


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> "OobleckVAE":
    from ssmttm.codecs.vae import load_vae  # diffusers is slow to import

    return load_vae(name).to(device)
