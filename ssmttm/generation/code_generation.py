"""Codes of all codebooks, from the first stage and, in a two-stage model, the second.

Shapes: n clips, K codebooks, C channels of a VAE's patches, T frames, S samples.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.generation.request import Request, Sampling
from ssmttm.generation.second_stage import SecondStageInputs, SecondStageStream
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState


@dataclass(frozen=True)
class PipelineOutput:
    """Generated clips.

    Attributes:
        audios: float32 [n, channels, S] on the CPU, S = round(duration * sample_rate); shorter clips end in zeros.
        sample_rate: in Hz.
        codes: int64 [n, K, T] on the CPU, or, if the second stage generates a VAE's latents, patches of these, float
            [n, C, T]; shorter clips end in -1.
        lengths: samples of each clip.
        metadata: the pipeline's metadata, with the engine and the diffusion steps of this call; `controls`, a list of
            those of each clip, if the model draws them from the captions.
    """

    audios: Tensor
    sample_rate: int
    codes: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(kw_only=True)

    @classmethod
    def merge(cls, parts: Sequence[tuple[Sequence[int], "PipelineOutput"]]) -> "PipelineOutput":
        """Clips of several outputs, each with its numbers, in the order of these."""
        items = [item for numbers, _ in parts for item in numbers]
        order = torch.tensor(items).argsort()
        n_samples, n_frames = (max(sizes) for sizes in zip(*(part._sizes() for _, part in parts), strict=True))
        audios = [F.pad(part.audios, (0, n_samples - part._sizes()[0])) for _, part in parts]
        codes = [F.pad(part.codes, (0, n_frames - part._sizes()[1]), value=-1) for _, part in parts]
        lengths = [length for _, part in parts for length in part.lengths]
        first = parts[0][1]
        metadata = dict(first.metadata)
        if "controls" in metadata:
            controls = [own for _, part in parts for own in part.metadata["controls"]]
            metadata["controls"] = [controls[row] for row in order]
        return cls(
            torch.cat(audios)[order], first.sample_rate, torch.cat(codes)[order], metadata,
            lengths=[lengths[row] for row in order],
        )  # fmt: skip

    def _sizes(self) -> tuple[int, int]:
        return self.audios.shape[-1], self.codes.shape[-1]

    def clip(self, item: int) -> Tensor:
        """The audio of one clip, as long as was requested: [channels, s]."""
        return self.audios[item, :, : self.lengths[item]]

    def metadata_of(self, item: int) -> dict[str, Any]:
        """The metadata of one clip, for its sidecar."""
        metadata = dict(self.metadata)
        if "controls" in metadata:
            metadata["controls"] = metadata["controls"][item]
        return metadata

    def as_dicts(self) -> list[dict[str, Any]]:
        """The clips as transformers' text-to-audio pipeline returns them: `audio`, float32 [channels, S] in NumPy, and
        `sampling_rate`."""
        clips = (self.clip(item) for item in range(len(self.lengths)))
        return [{"audio": wav.numpy(), "sampling_rate": self.sample_rate} for wav in clips]


@dataclass(frozen=True)
class Change:
    """What changes in the codes from `frame` on (None: from now on), and the request as it is then. None: it stays."""

    request: Request
    conditions: TextConditions | None = None
    sampling: Sampling | None = None
    controls: Controls | None = None
    fade_frames: int = 0
    frame: int = 0


class CodeGenerator:
    """Both stages in progress. A clone goes on exactly as the original does.

    Attributes:
        request: the prompts and settings as they are now.
        schedule: changes to come.
    """

    def __init__(
        self, request: Request, sampler: CodeSampler, second_stage: SecondStageStream | None,
        clip: ClipCodes | None = None, schedule: Sequence[Change] = (),
    ) -> None:  # fmt: skip
        """`clip`: the codes that both stages continue; they are returned first."""
        self.request, self.schedule = request, list(schedule)
        self.sampler, self.second_stage = sampler, second_stage
        self.n_clip_frames = 0 if clip is None else clip.n_frames
        self._ready = [] if clip is None else [clip]
        self._finished = False
        sampler.skip(self.n_clip_frames)

    def next_codes(self, chunk_frames: int) -> ClipCodes | None:
        """The next codes; None after the end. A second stage returns those of a window."""
        while not self._ready:
            if self._finished:
                return None
            coarse = self.sampler.next_frames(self._until_next_change(chunk_frames))  # [n, N, t]
            if self.second_stage is None:
                return None if coarse is None else ClipCodes(coarse, coarse)
            if coarse is None:
                self._finished = True
                self._ready = [self.second_stage.finish()]
            else:
                self._ready = self.second_stage.push(coarse)
        return self._ready.pop(0)

    def change(self, change: Change) -> None:
        """Change what the codes to come depend on; see `CodeSampler.change`. A stage takes the controls that it has."""
        controls = change.controls
        own = None if controls is None else controls.supported_by(self.sampler.model.config)
        self.sampler.change(change.conditions, change.sampling, own, change.fade_frames)
        if self.second_stage is not None and change.conditions is not None:
            inputs = self.second_stage.inputs
            inputs = second_stage_inputs(change.conditions, inputs.seeds, inputs.controls, self.sampler.device)
            self.second_stage.inputs = inputs
        if controls is not None:
            self._set_second_controls(controls)
        self.request = change.request

    def _until_next_change(self, chunk_frames: int) -> int:
        """Make the changes that are due; the frames of a chunk that ends at the next one."""
        while self.schedule and self.schedule[0].frame <= self.sampler.n_yielded:
            self.change(self.schedule.pop(0))
        if not self.schedule:
            return chunk_frames
        return min(chunk_frames, self.schedule[0].frame - self.sampler.n_yielded)

    def set_controls(self, controls: Controls) -> None:
        """Controls of the codes to come, without processing the last ones again."""
        self.sampler.set_controls(controls.supported_by(self.sampler.model.config))
        self._set_second_controls(controls)

    def _set_second_controls(self, controls: Controls) -> None:
        if self.second_stage is not None:
            own = controls.supported_by(self.second_stage.stage.model.config).to(self.sampler.device)
            self.second_stage.inputs = replace(self.second_stage.inputs, controls=own)

    def state(self) -> dict[str, Any]:
        """All that the next codes depend on besides the models, the conditions and the settings."""
        second = self.second_stage
        return {
            "sampler": self.sampler.state(), "second_stage": None if second is None else second.state(),
            "n_scheduled": len(self.schedule), "ready": [vars(codes) for codes in self._ready],
            "finished": self._finished, "n_clip_frames": self.n_clip_frames,
        }  # fmt: skip

    def restore(self, state: dict[str, Any], fill: Callable[[LMState, Any], LMState]) -> None:
        """Take the `state` of a generator of the same models, conditions, settings and changes to come; see
        `CodeSampler.restore`."""
        self.sampler.restore(state["sampler"], fill)
        if self.second_stage is not None:
            self.second_stage.restore(state["second_stage"])
        self._finished, self.n_clip_frames = state["finished"], state["n_clip_frames"]
        self._ready = [ClipCodes(**codes).to(self.sampler.device) for codes in state["ready"]]

    def clone(self, seeds: Sequence[int] | None = None) -> "CodeGenerator":
        """A copy that goes on independently: exactly as this one, or with other seeds."""
        new = copy.copy(self)
        new.sampler, new._ready, new.schedule = self.sampler.clone(seeds), list(self._ready), list(self.schedule)
        if seeds is not None:
            new.request = replace(self.request, seeds=list(seeds))
        if self.second_stage is not None:
            new.second_stage = self.second_stage.clone()
            if seeds is not None:
                new.second_stage.inputs = replace(self.second_stage.inputs, seeds=seeds)
        return new


def second_stage_inputs(
    conditions: TextConditions, seeds: Sequence[int], controls: Controls, device: torch.device
) -> SecondStageInputs:
    """Inputs of the second stage; of a blend, it follows each item's prompt of the greatest weight."""
    text = conditions.heaviest_text()
    return SecondStageInputs(text.to(device), conditions.null_text.to(device), seeds, controls)
