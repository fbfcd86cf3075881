"""A trace of some steps of a training by torch.profiler, and the history of GPU memory."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ssmttm.errors import UserError

_TOP = 20  # operations in summary.txt


class StepProfiler:
    """Profiles the steps from A to B of `train.profile=A:B`, counted from 1, into RUN/profile/.

    trace-rankR.json is for chrome://tracing or https://ui.perfetto.dev, summary-rankR.txt lists the longest operations,
    memory-rankR.pickle, on CUDA, is for https://pytorch.org/memory_viz.

    Args:
        steps: A:B or None.
    """

    def __init__(self, steps: str | None, run_dir: Path, rank: int, device: torch.device) -> None:
        self._first, self._last = parse_steps(steps) if steps is not None else (0, -1)
        self._folder, self._rank, self._device = run_dir / "profile", rank, device
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Called before step `step`, the first being 1."""
        if step != self._first:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def after_step(self, step: int) -> None:
        """Called after step `step`."""
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Write the files if steps are being profiled: after the last of them, or at an earlier end of the training."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"trace-rank{self._rank}.json"))
        table = self._profile.key_averages().table(sort_by=f"self_{self._device.type}_time_total", row_limit=_TOP)
        (self._folder / f"summary-rank{self._rank}.txt").write_text(table)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None


def parse_steps(text: str) -> tuple[int, int]:
    """10:15 -> (10, 15). Raises UserError for anything else."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"train.profile={text}: give the first and last step to profile, as train.profile=10:15")
    return int(first), int(last)
