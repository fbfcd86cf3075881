"""Audio that nothing can be measured of: silence, a constant, samples out of scale, channels that cancel.

`read_music` is how audio from outside is read for metrics, listening tests and melodies.
"""

from pathlib import Path

from torch import Tensor

from ssmttm.audio.io import read, resample, to_mono
from ssmttm.errors import UserError

SILENCE_RMS = 1e-3  # -60 dBFS
_FRAME = 0.05  # seconds
_MAX_PEAK = 16.0  # 24 dB above full scale
_MAX_OVER = 0.02  # fraction of the samples above full scale; decoders of lossy formats exceed it by single samples
_CANCELLED = 1 / 3  # energy of the mono mix, 1 for unrelated channels; for two channels, mid is 7 dB below side


def defect(wav: Tensor, sample_rate: int) -> str | None:
    """Why audio [C, S], full scale 1, holds no music that could be measured after a mix to mono; None if it does."""
    wav = wav.detach().float()
    if wav.numel() == 0:
        return "it has no samples"
    if not bool(wav.isfinite().all()):
        return "it contains NaN or infinite samples"
    peak, over = float(wav.abs().max()), float((wav.abs() > 1).float().mean())
    if peak > _MAX_PEAK or over > _MAX_OVER:
        return f"its samples reach {peak:,.3g} times full scale: divide them by the largest value of their format"
    frames = _varying_frames(wav, sample_rate)  # [C, T, frame]
    if float(frames.square().mean(-1).max()) < SILENCE_RMS**2:
        level = float(wav.mean(-1).abs().max())
        return f"it is constant, {level:.2g} of full scale" if level >= SILENCE_RMS else "it is silent"
    energy, mono = frames.square().mean(), frames.mean(0).square().mean()
    if len(wav) * mono < _CANCELLED * energy:
        return "its channels cancel each other when mixed down to mono: invert one of them"
    return None


def check_music(wav: Tensor, sample_rate: int, name: str | Path) -> None:
    """Raise UserError if audio [C, S] has a `defect`."""
    if reason := defect(wav, sample_rate):
        raise UserError(f"{name} holds no music to use: {reason}")


def read_music(
    path: str | Path, sample_rate: int | None = None, mono: bool = True, seconds: float | None = None
) -> tuple[Tensor, int]:
    """`audio.read`, of the first `seconds` if given; raises UserError also if that part has a `defect`."""
    wav, rate = read(path, mono=False)
    if seconds is not None:
        wav = wav[:, : round(seconds * rate)]
    check_music(wav, rate, path)
    wav = to_mono(wav) if mono else wav
    return (wav, rate) if sample_rate is None else (resample(wav, rate, sample_rate), sample_rate)


def _varying_frames(wav: Tensor, sample_rate: int) -> Tensor:
    """Frames of 50 ms without their mean: [C, S] -> [C, T, frame]; a remainder shorter than a frame is dropped."""
    size = min(max(2, round(_FRAME * sample_rate)), wav.shape[-1])
    frames = wav.unfold(-1, size, size)
    return frames - frames.mean(-1, keepdim=True)
