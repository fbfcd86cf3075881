"""Small denoisers with random weights, and inputs for them."""

import torch

from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser, LatentDenoiserConfig
from ssmttm.text.condition import TextCondition

K, WIDTH, N_COARSE, TEXT_DIM = 4, 3, 1, 8  # codebooks, channels per codebook, coarse codebooks
S, C = N_COARSE * WIDTH, (K - N_COARSE) * WIDTH
SIZES = {
    "n_codebooks": K, "codebook_dim": WIDTH, "n_coarse_codebooks": N_COARSE, "d_model": 16, "n_layers": 2, "d_state": 8,
    "headdim": 8, "chunk_size": 8, "n_heads": 2, "text_dim": TEXT_DIM, "time_dim": 16, "unet_mults": [1, 2, 1],
    "unet_blocks": 1,
}  # fmt: skip
NETWORKS = {
    "mamba2": {},
    "attention": {"layers": "attention"},
    "unet": {"network": "unet"},
    "mamba1": {"layers": "mamba1"},
    "mamba3": {"layers": "mamba3"},
    "s4d": {"layers": ["s4d", "attention"]},
}


def new_denoiser(name="mamba2", **changes) -> LatentDenoiser:
    """As initialised, with latents of mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    model = LatentDenoiser(LatentDenoiserConfig(**(SIZES | NETWORKS[name] | changes)))
    model.set_statistics(torch.zeros(K), torch.ones(K))
    return model.eval()


def denoiser(name="mamba2", **changes) -> LatentDenoiser:
    """With perturbed weights: as initialised, the output is zero for any input."""
    model = new_denoiser(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def captions(*lengths, seed=2) -> TextCondition:
    generator = torch.Generator().manual_seed(seed)
    return TextCondition.stack([torch.randn(n, TEXT_DIM, generator=generator) for n in lengths])


def conditions(frames, lengths=(4, 0, 7), dtype=torch.float32, **options) -> Conditions:
    """Coarse latents, and captions with these numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    coarse_latents = torch.randn(len(lengths), S, frames, generator=generator, dtype=torch.float64).to(dtype)
    return Conditions(coarse_latents, captions(*lengths), **options)


def noisy(frames, items=3, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and times."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(items, C, frames, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.linspace(0.1, 0.9, items, dtype=dtype)
