"""Pipelines with random weights, small enough to stream minutes in a test: 25 frames/s, 2,400 Hz."""

from pathlib import Path

import torch
from small_denoisers import denoiser
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, TEXT_DIM, small_codec
from small_token_lms import small_token_lm
from small_word_encoder import WordEncoder

from ssmttm import MusicPipeline
from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig
from ssmttm.patterns import get_pattern


def small_pipeline(folder: Path, pattern="delay", two_stages=False, seed=0, **changes) -> MusicPipeline:
    """One stage, or two: a language model of one codebook and a denoiser for the others."""
    codec = small_codec(folder / "codec")
    sizes = {"n_codebooks": 1 if two_stages else N_CODEBOOKS, "codebook_size": CODEBOOK_SIZE, "text_dim": TEXT_DIM}
    model = small_token_lm(**(sizes | {"tempo": True, "chroma": True} | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.heads.weight.mul_(4)  # so that the codes depend clearly on the words
    stage = None
    if two_stages:
        settings = SecondStageConfig(SamplerSettings("flow", None, 3), 2.0, 1.5, window=16, overlap=4)
        stage = SecondStage(denoiser(chroma=True, tempo=True), codec, settings)
    encoder = WordEncoder(dim=TEXT_DIM)
    return MusicPipeline(model, codec, encoder, get_pattern(pattern, model.config.n_codebooks), second_stage=stage)
