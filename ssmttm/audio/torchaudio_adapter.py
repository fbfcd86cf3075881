"""The extra `audio`: resampling on a GPU by torchaudio, decoding of files that libsndfile does not read by torchcodec.

A package that does not load is passed over, as a build for CUDA beside a torch for CPUs; `describe` reports it.
torchcodec needs FFmpeg's shared libraries.

Shapes: C channels, S samples.
"""

import functools
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from torch import Tensor

from ssmttm.errors import first_line

_RESAMPLING, _DECODING = "torchaudio.functional", "torchcodec.decoders"
# A Kaiser window as steep as that of soxr's HQ filter, from torchaudio's documentation ("kaiser best").
_FILTER = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "resampling_method": "sinc_interp_kaiser",
           "beta": 14.769656459379492}  # fmt: skip


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None; and the package's version, or why it is not used."""
    package = name.partition(".")[0]
    try:
        return import_module(name), version(package)
    except ModuleNotFoundError:
        return None, "not installed"
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch, or no FFmpeg
        return None, f"passed over, it does not load here ({first_line(error)})"


def describe() -> str:
    """What decodes and resamples audio, for `ssmttm info`."""
    found = [f"{name.partition('.')[0]} {load(name)[1]}" for name in (_RESAMPLING, _DECODING)]
    return f"soundfile, soxr; {', '.join(found)}"


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor | None:
    """Resample [..., S] on its device; None without torchaudio."""
    module = load(_RESAMPLING)[0]
    return None if module is None else module.resample(wav, from_rate, to_rate, **_FILTER)


def decode(path: Path) -> tuple[Tensor, int, float | None] | None:
    """A whole file: float32 [C, S], its sample rate, and the seconds that its header states, if it does. None without
    torchcodec, or if it cannot decode the file."""
    module = load(_DECODING)[0]
    if module is None:
        return None
    try:
        decoder = module.AudioDecoder(str(path))
        samples = decoder.get_all_samples()
    except (RuntimeError, ValueError):  # no audio
        return None
    return samples.data, int(samples.sample_rate), decoder.metadata.duration_seconds_from_header
