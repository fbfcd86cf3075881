"""What a run records: metrics.jsonl always, TensorBoard beside it, and how fast it goes against the device's peak."""

import json
import time
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ssmttm import audio

# Dense peak of the tensor cores in bf16 (float32 accumulation), FLOP/s, from the makers' data sheets.
BF16_PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class MetricsLog:
    """config.yaml, metrics.jsonl, TensorBoard and samples of a run folder; a resume drops lines after `start_step`."""

    def __init__(self, run_dir: Path, config: DictConfig, start_step: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml")
        self.path = run_dir / "metrics.jsonl"
        self.samples_dir = run_dir / "samples"
        self._keep_until(start_step)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object on one line: step and every value (a loss, a rate, a validation figure)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def write_audio(self, step: int, name: str, wav: Tensor, sample_rate: int) -> None:
        """Keep one sample, [C, S], as samples/step-NNNNNNNN/NAME.wav and in TensorBoard."""
        folder = self.samples_dir / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        wav = wav.detach().float().cpu().clamp(-1, 1)
        audio.write(folder / f"{name}.wav", wav, sample_rate)
        self._board.add_audio(name, wav.mean(0, keepdim=True), step, sample_rate=sample_rate)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(kept))
        aside.replace(self.path)


class Speed:
    """Counts between two log lines; `rates()` gives per-second figures over all ranks and starts anew."""

    def __init__(self, peak_flops: float) -> None:
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._since, self.tokens, self.audio_seconds, self.flops, self.steps = time.perf_counter(), 0.0, 0.0, 0.0, 0

    def add(self, tokens: float, audio_seconds: float, flops: float) -> None:
        """One optimiser step: codes predicted, seconds of audio and FLOPs (forward and backward), of all ranks."""
        self.tokens += tokens
        self.audio_seconds += audio_seconds
        self.flops += flops
        self.steps += 1

    def pause(self, since: float) -> None:
        """Leave out the time from `since` to now (validation, samples, checkpoint)."""
        self._since += time.perf_counter() - since

    def rates(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / elapsed,
            "audio_seconds_per_second": self.audio_seconds / elapsed,
            "mfu": self.flops / elapsed / self.peak_flops,
            "seconds_per_step": elapsed / max(self.steps, 1),
        }
        self._reset()
        return rates


@cache
def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The device's peak in FLOP/s and its source: a table for known GPUs in bf16, else a measurement."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, peak in BF16_PEAK.items():
            if known in name:
                return peak, f"{known} bf16 data sheet"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak = _measured_matmul(device, dtype, size=8192 if device.type == "cuda" else 1024)
    return peak, f"measured {precision} matrix product on {device.type}"


def _measured_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of a few products of two size x size matrices, FLOP/s."""
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
