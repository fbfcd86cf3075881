"""Pipelines with random weights, small enough to stream minutes in a test: 25 frames/s, 2,400 Hz."""

from pathlib import Path

import torch
from small_denoisers import denoiser
from small_stores import CODEBOOK_SIZE, N_CODEBOOKS, TEXT_DIM, small_codec
from small_token_lms import small_token_lm
from small_vaes import LATENT_CHANNELS
from small_word_encoder import WordEncoder

from ssmttm import MusicPipeline
from ssmttm.codecs import Codec
from ssmttm.codecs.vae import OobleckVAE, PatchedVAE, frames_per_code
from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig
from ssmttm.patterns import get_pattern


def small_pipeline(
    folder: Path, pattern="delay", two_stages=False, seed=0, vae: OobleckVAE | None = None, **changes
) -> MusicPipeline:
    """One stage, or two: a language model of one codebook and a denoiser for the others, or for the latents of a
    VAE."""
    codec = small_codec(folder / "codec")
    sizes = {"n_codebooks": 1 if two_stages else N_CODEBOOKS, "codebook_size": CODEBOOK_SIZE, "text_dim": TEXT_DIM}
    model = small_token_lm(**(sizes | {"tempo": True, "chroma": True} | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.heads.weight.mul_(4)  # so that the codes depend clearly on the words
    stage = small_second_stage(codec, vae) if two_stages else None
    encoder = WordEncoder(dim=TEXT_DIM)
    return MusicPipeline(model, codec, encoder, get_pattern(pattern, model.config.n_codebooks), second_stage=stage)


def small_second_stage(codec: Codec, vae: OobleckVAE | None) -> SecondStage:
    """Random weights, windows of 16 frames; with a VAE the codec keeps its first codebook only."""
    settings = SecondStageConfig(SamplerSettings("flow", None, 3), 2.0, 1.5, window=16, overlap=4)
    if vae is None:
        return SecondStage(denoiser(chroma=True, tempo=True), codec, settings)
    ratio = frames_per_code(vae.frame_rate, codec.frame_rate, vae.name, codec.name)
    model = denoiser(chroma=True, tempo=True, n_codebooks=1, vae_channels=LATENT_CHANNELS, vae_frames=ratio)
    model.set_statistics(torch.tensor([0.1, 0.3, -0.2, 0.1]), torch.tensor([0.9, 1.1, 0.7, 1.3]))
    return SecondStage(model, codec.keep_codebooks(1), settings, PatchedVAE(vae, ratio))
