"""The metrics of a run: metrics.jsonl, trackers, the console's lines, throughput and MFU."""

import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssmttm import audio
from ssmttm.files import write_text
from ssmttm.training.monitoring.trackers import open_trackers

# Dense bf16 peak of the tensor cores (float32 accumulation), FLOP/s, from the data sheets.
BF16_PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

_PEAK_PRODUCTS, _PEAK_SECONDS = 8, 0.5  # of a measurement of the peak


class MetricsLog:
    """Writes a run folder's config.yaml, metrics.jsonl and samples, and to `train.trackers`; drops lines after
    `start_step`."""

    def __init__(self, run_dir: Path, config: DictConfig, start_step: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml")
        self.path = run_dir / "metrics.jsonl"
        self.samples_dir = run_dir / "samples"
        self._keep_until(start_step)
        self._file = self.path.open("a", buffering=1)
        self._trackers = open_trackers(config.train.trackers, run_dir, config, start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one JSON line with the step and the finite values, and log them to the trackers."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        named = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.write(step, named)

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        """Write one sample, [C, S], to samples/step-NNNNNNNN/NAME.wav and to the trackers."""
        folder = self.samples_dir / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        wav = wav.detach().float().cpu().clamp(-1, 1)
        audio.write(folder / f"{name}.wav", wav, sample_rate)
        for tracker in self._trackers:
            tracker.write_audio(step, name, wav, sample_rate)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        complete = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text(self.path, "".join(line for line in complete if json.loads(line)["step"] <= step))


class Throughput:
    """Sums between two log lines; `rates()` returns rates over all ranks and resets the sums.

    Args:
        peak_flops: of all ranks.
        measure: measures it anew, when the training is faster than the peak: it was then measured on a busy machine.
    """

    def __init__(self, peak_flops: float, measure: Callable[[], float]) -> None:
        self.peak_flops, self._measure = peak_flops, measure
        self._reset()

    def _reset(self) -> None:
        self._since, self.tokens, self.audio_seconds, self.flops, self.steps = time.perf_counter(), 0.0, 0.0, 0.0, 0
        self.waited = 0.0

    def add(self, tokens: float, audio_seconds: float, flops: float, waited: float = 0.0) -> None:
        """Add one optimiser step: codes predicted, seconds of audio and FLOPs (forward and backward), of all ranks, and
        the seconds that this rank waited for data."""
        self.waited += waited
        self.tokens += tokens
        self.audio_seconds += audio_seconds
        self.flops += flops
        self.steps += 1

    def pause(self, since: float) -> None:
        """Exclude the time from `since` to now (validation, samples, checkpoint)."""
        self._since += time.perf_counter() - since

    def rates(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        achieved = self.flops / elapsed
        if achieved > self.peak_flops:
            self.peak_flops = max(achieved, self._measure())  # the peak is at least what was achieved
        rates = {
            "tokens_per_second": self.tokens / elapsed,
            "audio_seconds_per_second": self.audio_seconds / elapsed,
            "mfu": achieved / self.peak_flops,
            "seconds_per_step": elapsed / max(self.steps, 1),
            "data_wait": self.waited / elapsed,
        }
        self._reset()
        return rates


@cache
def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The peak of a device in FLOP/s and its source: the data sheet of a known GPU in bf16, else a measurement."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, peak in BF16_PEAK.items():
            if known in name:
                return peak, f"{known} bf16 data sheet"
    return measured_peak(device, precision), f"measured {precision} matrix product on {device.type}"


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest product of two square matrices, of at least eight and for at least half a second."""
    dtype, size = torch.bfloat16 if precision == "bf16" else torch.float32, 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=dtype)
    times: list[float] = []
    while len(times) < _PEAK_PRODUCTS or sum(times) < _PEAK_SECONDS:
        start = time.perf_counter()
        left @ left
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """The console's line for a log interval: losses, learning rate, throughput, MFU and ETA."""
    eta = int((steps - step) * values["seconds_per_step"])
    skipped = f"{values['skipped_steps']:.0f} steps skipped | " if values["skipped_steps"] else ""
    other_losses = "".join(f" | {key} {values[key]:.3f}" for key in values if key.endswith("_loss"))
    return (
        f"step {step:>{len(str(steps))}}/{steps} | loss {values['loss']:.4f}{other_losses} | lr {values['lr']:.2e} | "
        f"grad {values['grad_norm']:.2f} | {values['tokens_per_second']:,.0f} tokens/s | "
        f"{values['audio_seconds_per_second']:.1f} audio-s/s | MFU {100 * values['mfu']:.1f} % | "
        f"data wait {100 * values['data_wait']:.1f} % | {values['peak_memory_gib']:.2f} GiB | {skipped}"
        f"ETA {eta // 3600}:{eta % 3600 // 60:02d}:{eta % 60:02d}"
    )


def validation_line(step: int, values: dict[str, float]) -> str:
    """The console's line for a validation."""
    listed = [f"{name.removeprefix('valid/')} {value:.4f}" for name, value in values.items()]
    return f"step {step} valid | {' | '.join(listed)}"
