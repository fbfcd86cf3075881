"""Codes of all codebooks, from the first stage and, in a two-stage model, the second.

Shapes: B items, K codebooks, N coarse codebooks, t frames.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.generation.request import Sampling
from ssmttm.generation.second_stage import SecondStageInputs, SecondStageStream
from ssmttm.models.controls import Controls


class CodeGenerator:
    """Both stages in progress. A clone goes on exactly as the original does."""

    def __init__(
        self, sampler: CodeSampler, second_stage: SecondStageStream | None, clip_codes: Tensor | None = None
    ) -> None:
        """`clip_codes`: [B, K, P], the codes that the sampler continues; they are returned first."""
        self.sampler, self.second_stage = sampler, second_stage
        self.n_clip_frames = 0 if clip_codes is None else clip_codes.shape[-1]
        self._ready = [] if clip_codes is None else [clip_codes]
        self._finished = False
        sampler.skip(self.n_clip_frames)

    def next_codes(self, chunk_frames: int) -> Tensor | None:
        """The next codes, [B, K, t]; None after the end. A second stage returns those of a window."""
        while not self._ready:
            if self._finished:
                return None
            frames = self.sampler.next_frames(chunk_frames)  # [B, N, t]
            if self.second_stage is None:
                return frames
            if frames is None:
                self._finished = True
                self._ready = [self.second_stage.finish()]
            else:
                self._ready = self.second_stage.push(frames)
        return self._ready.pop(0)

    def change(
        self, conditions: TextConditions | None = None, sampling: Sampling | None = None,
        controls: Controls | None = None, fade_frames: int = 0,
    ) -> None:  # fmt: skip
        """Change what the codes to come depend on; see `CodeSampler.change`. `controls` are those that a stage has."""
        model = self.sampler.model
        self.sampler.change(
            conditions, sampling, None if controls is None else controls.supported_by(model.config), fade_frames
        )
        if self.second_stage is not None:
            inputs = self.second_stage.inputs
            if conditions is not None:
                inputs = second_stage_inputs(conditions, inputs.seeds, inputs.controls, self.sampler.device)
            if controls is not None:
                own = controls.supported_by(self.second_stage.stage.model.config)
                inputs = replace(inputs, controls=own.to(self.sampler.device))
            self.second_stage.inputs = inputs

    def clone(self, seeds: Sequence[int] | None = None) -> "CodeGenerator":
        """A copy that goes on independently: exactly as this one, or with other seeds."""
        new = copy.copy(self)
        new.sampler, new._ready = self.sampler.clone(seeds), list(self._ready)
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
