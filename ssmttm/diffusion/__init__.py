"""Diffusion: what a denoiser learns to say about noisy latents, and how samples are drawn with it."""
