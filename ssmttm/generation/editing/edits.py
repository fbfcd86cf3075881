"""A clip edited by a pipeline: a region generated again, audio-to-audio, the end of a loop.

Shapes: T frames, C channels, S samples.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.code_generation import PipelineOutput, second_stage_inputs
from ssmttm.generation.editing.continuation import AudioInput
from ssmttm.generation.editing.loop import unrolled
from ssmttm.generation.editing.repaint import (
    Repainted,
    fade_samples,
    known_around,
    mix_region,
    region_frames,
    repaint_codes,
)
from ssmttm.generation.engine import CodeSampler
from ssmttm.generation.engines import Engine
from ssmttm.generation.request import MAX_SEED, Prompt, Request, Sampling
from ssmttm.generation.second_stage import SecondStage
from ssmttm.models.controls import Controls

if TYPE_CHECKING:
    from ssmttm.generation.pipeline import MusicPipeline

_LOOP_CANDIDATES = 4


def repaint(
    pipeline: "MusicPipeline", prompt: Prompt, clip: AudioInput, region: tuple[float, float], *, candidates: int = 4,
    seed: int = 0, guidance_scale: float | None = None, temperature: float | None = None, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, negative_prompt: str | None = None,
    bpm: float | None = None, key: str | None = None,
    diffusion_steps: int | None = None, engine: str = "auto", weights: str = "fp32",
) -> PipelineOutput:  # fmt: skip
    """Generate a region of a clip again. Outside it the samples are the clip's own, at the pipeline's `sample_rate` and
    on its channels, but for a short mix at its edges, within the decoder's reach.

    Args:
        clip: as `continue_from` of a call.
        region: start and stop in seconds.
        candidates: how many are generated, with seeds `seed`, `seed` + 1, ...; the one is taken after which the
            model predicts the rest of the clip best.
        The others: as in a call.

    Returns:
        One clip; `metadata["repaint"]` has the region, the seed that was taken, and the score of every candidate.

    Raises:
        UserError: an argument is out of its range, or the region is not within the clip.
    """
    if candidates < 1:
        raise UserError(f"candidates must be at least 1, got {candidates}")
    sampling = pipeline.sampling(
        guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    request = Request.create(prompt, None, seed, sampling, bpm=bpm, negative_prompts=negative_prompt, key=key)
    request = replace(request, is_whole=False)
    seeds = _candidate_seeds(seed, candidates)
    second_stage = pipeline.check_request(request, diffusion_steps)
    encoded = pipeline.encode_clip(clip)
    hop = pipeline.decoder.hop_length
    frames = region_frames(region, encoded, pipeline.sample_rate, hop)
    step_engine = pipeline.engine(engine, weights)
    controls = pipeline.controls(request, 0, encoded.codes.n_frames)
    codes, found = _regenerate(pipeline, request, encoded.codes, controls, frames, seeds, second_stage, step_engine)
    first, last = (frame * hop - encoded.n_padding for frame in frames)
    decoded = pipeline.decode(codes.full)[0, :, encoded.n_padding :]  # [C, S]
    wav = mix_region(encoded.wav, decoded, max(0, first), last, fade_samples(pipeline.decoder.context, hop))
    about = {"region": list(region), "seed": seeds[found.best], "scores": found.scores}
    metadata = pipeline.metadata_of_call(second_stage, step_engine) | {"repaint": about}
    return PipelineOutput(wav[None], pipeline.sample_rate, codes.full.cpu(), metadata, lengths=[wav.shape[-1]])


def audio_to_audio(
    pipeline: "MusicPipeline", prompt: Prompt, clip: AudioInput, strength: float = 0.6, *, seed: int = 0,
    negative_prompt: str | None = None, bpm: float | None = None, diffusion_steps: int | None = None,
) -> PipelineOutput:  # fmt: skip
    """Render a clip again with other words, in a two-stage model: its coarse codes stay, and the second stage
    starts from the others with noise added.

    Args:
        strength: in (0, 1], how much of them is noise: near 0 the clip stays as it is, 1 keeps its coarse codes
            only.
        The others: as in a call.
    """
    request = Request.create(prompt, None, seed, Sampling(), bpm=bpm, negative_prompts=negative_prompt)
    request = replace(request, is_whole=False)
    second_stage = pipeline.check_request(request, diffusion_steps)
    if second_stage is None:
        raise UserError("this model has one stage: audio-to-audio is for two-stage models")
    if bpm is not None and not second_stage.model.config.tempo:
        raise UserError("the second stage, which alone runs here, was not trained with bpm: leave it out")
    if negative_prompt and second_stage.settings.guidance_scale <= 1:
        raise UserError("a negative prompt acts through guidance, which the second stage has none of: leave it out")
    encoded = pipeline.encode_clip(clip)
    n_frames = encoded.codes.n_frames
    own = pipeline.controls(request, 0, n_frames).supported_by(second_stage.model.config)
    device = next(pipeline.model.parameters()).device
    inputs = second_stage_inputs(pipeline.text_conditions(request), [seed], own, device)
    codes = second_stage.regenerate(encoded.codes, (0, n_frames), inputs, strength).full
    wav = pipeline.decode(codes)[..., encoded.n_padding :]
    metadata = pipeline.metadata_of_call(second_stage) | {"strength": strength}
    return PipelineOutput(wav, pipeline.sample_rate, codes.cpu(), metadata, lengths=[wav.shape[-1]])


def close_loop(
    pipeline: "MusicPipeline", request: Request, codes: ClipCodes, second_stage: SecondStage | None, engine: Engine
) -> ClipCodes:
    """The clips' codes with last frames that lead into the first ones, which come again with their own controls."""
    closed, n_frames = [], codes.n_frames
    around = torch.arange(2 * n_frames, device=codes.coarse.device) % n_frames
    for own, alone in zip(codes.items(), request.batches(1), strict=True):
        both, frames = unrolled(own, pipeline.codec.frame_rate)
        controls = pipeline.controls(alone, 0, n_frames).gather_frames(around)
        seeds = _candidate_seeds(alone.seeds[0] + 1, _LOOP_CANDIDATES)
        made, _ = _regenerate(pipeline, alone, both, controls, frames, seeds, second_stage, engine)
        closed.append(made.frames(0, n_frames))
    return ClipCodes.cat(closed, dim=0)


def _candidate_seeds(first: int, n: int) -> list[int]:
    """n seeds from `first` on, and from 0 after the greatest one."""
    return [(first + number) % (MAX_SEED + 1) for number in range(n)]


def _regenerate(
    pipeline: "MusicPipeline", request: Request, codes: ClipCodes, controls: Controls, frames: tuple[int, int],
    seeds: list[int], second_stage: SecondStage | None, engine: Engine,
) -> tuple[ClipCodes, Repainted]:  # fmt: skip
    """Codes of one clip with the frames (start, stop) generated again, once with each seed, and the choice of one;
    `controls` by frame."""
    given = known_around(codes.coarse, frames, pipeline.pattern)
    conditions = pipeline.text_conditions(request)
    sampler = CodeSampler(
        pipeline.model, conditions, pipeline.pattern, given.shape[-1], request.sampling, seeds[:1], given,
        controls.supported_by(pipeline.model.config), 0, engine,
    )  # fmt: skip
    found = repaint_codes(sampler, codes.coarse, frames, seeds, pipeline.codec.frame_rate)
    if second_stage is None:
        return ClipCodes(found.codes, found.codes), found
    own = controls.supported_by(second_stage.model.config)
    inputs = second_stage_inputs(conditions, [seeds[found.best]], own, sampler.device)
    return second_stage.regenerate(ClipCodes(found.codes, codes.full), frames, inputs), found
