"""VAEs with random weights, small enough for tests, and a config that trains one."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from ssmttm import config
from ssmttm.codecs import build_codec
from ssmttm.codecs.vae import OobleckVAE, load_vae

LATENT_CHANNELS = 3


def vae_fields(ratios=(4, 3), channels=1, sample_rate=2400, latent_channels=LATENT_CHANNELS) -> dict:
    """Fields of a config's `codec` section; with the ratios multiplying to 48 at 2,400 Hz: 50 latents a second."""
    return {
        "kind": "oobleck", "sampling_rate": sample_rate, "audio_channels": channels,
        "downsampling_ratios": list(ratios), "channel_multiples": [2] * len(ratios),
        "encoder_hidden_size": 2 * latent_channels, "decoder_channels": 4, "decoder_input_channels": latent_channels,
    }  # fmt: skip


def small_vae(folder: Path | None = None, seed: int = 5, **fields) -> OobleckVAE:
    """A VAE with clearly audible output; with a folder its name is that."""
    torch.manual_seed(seed)
    vae = build_codec(vae_fields(**fields)).eval()
    assert isinstance(vae, OobleckVAE)
    if folder is None:
        return vae
    vae.save(folder)
    return load_vae(folder)


def vae_config(store: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """A very small VAE on a store of tones."""
    fields = [f"codec.{key}={str(value).replace(' ', '')}" for key, value in vae_fields().items()]
    sizes = (
        "data.batch_size=2", "data.seconds=1.0", "train.precision=fp32", "train.log_every=1",
        "train.eval_every=4", "train.eval_batches=1", "train.checkpoint_every=100", "codec_training.restart_every=2",
        "schedule.warmup_steps=1",
    )  # fmt: skip
    return config.load(
        "experiment=tiny_oobleck", *fields, *sizes, f"data.store={store}", f"run_dir={run_dir}", *overrides
    )
