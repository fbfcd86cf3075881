"""Diffusion objectives, samplers and guidance of the latent denoiser."""
