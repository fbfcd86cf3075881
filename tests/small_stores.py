"""Stores small enough to train on in seconds (random codes with captions, short tones), and configs for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from omegaconf import DictConfig

from ssmttm import config
from ssmttm.audio.notation import KEYS
from ssmttm.codecs import Codec, TinyCodec, TinyCodecConfig
from ssmttm.codecs.vae import OobleckVAE
from ssmttm.data.store import Store, text_name
from ssmttm.data.text_table import write_text_table
from ssmttm.data.writer import StoreWriter
from ssmttm.text import load_text_encoder

N_CODEBOOKS, CODEBOOK_SIZE, TEXT_DIM, FRAMES = 4, 16, 8, 20
SAMPLE_RATE, HOP, CODEBOOK_DIM = 2400, 96, 3
TEXT_FINGERPRINT = "1" * 16


def write_rows_store(path: Path, rows: list[dict[str, Any]]) -> Store:
    """A store with a manifest of these rows only."""
    writer = StoreWriter(path, {"source": {}}, None, SAMPLE_RATE)
    for row in rows:
        writer.add(row)
    return writer.finish()


def small_codec(folder: Path) -> TinyCodec:
    """A codec with random weights; its name is its folder."""
    torch.manual_seed(3)
    sizes = dict(n_codebooks=N_CODEBOOKS, codebook_size=CODEBOOK_SIZE, codebook_dim=CODEBOOK_DIM, encoder_width=16,
                 decoder_width=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))  # fmt: skip
    TinyCodec(TinyCodecConfig(sample_rate=SAMPLE_RATE, hop_length=HOP, window=2 * HOP, **sizes)).save(folder)
    return TinyCodec.load(folder, str(folder))


CAPTIONS = tuple(f"caption {i}" for i in range(6))


def write_codes_store(
    path: Path,
    segments: int = 24,
    seed: int = 0,
    codec: Codec | None = None,
    captions: Sequence[str] = CAPTIONS,
    text_folder: Path | None = None,
    vae: OobleckVAE | None = None,
) -> Path:
    """Codes [4, 14..20] in which each codebook repeats the one before, so that a model can learn them.

    Args:
        codec: the store's codec; every segment then has a tone as its audio, and every other one a tempo, a key, a
            metre and bar lines.
        text_folder: the store's text encoder; without one, the embeddings are random.
        vae: whose latents the store has, random ones that repeat the codes.
    """
    rng = np.random.default_rng(seed)
    codec_info = {
        "name": codec.name if codec else "fake", "fingerprint": codec.fingerprint if codec else "0" * 16,
        "sample_rate": SAMPLE_RATE, "frame_rate": 25.0, "n_codebooks": N_CODEBOOKS, "codebook_size": CODEBOOK_SIZE,
    }  # fmt: skip
    names = ("name", "fingerprint", "sample_rate", "frame_rate", "latent_channels")
    r = 0 if vae is None else round(vae.frame_rate / 25)
    latents_info = None if vae is None else {name: getattr(vae, name) for name in names} | {"frames_per_code": r}
    writer = StoreWriter(path, {"seed": seed}, codec=codec_info, sample_rate=SAMPLE_RATE, latents=latents_info)
    for i in range(segments):
        length = int(rng.integers(FRAMES - 6, FRAMES + 1))
        codes = np.repeat(rng.integers(0, CODEBOOK_SIZE, (1, length)), N_CODEBOOKS, axis=0)
        row = {
            "id": f"s{i}", "split": "valid" if i % 6 == 5 else "train", "licence": "CC0-1.0", "duration": length / 25,
            "captions": [captions[i % len(captions)]], "tags": [f"tag {i % 6}", "music"],
        }  # fmt: skip
        if codec:
            bars = [round(0.1 + 0.24 * n, 2) for n in range(3)]
            truth = {"bpm": 60 + 5 * i, "key": KEYS[i % 24], "metre": ("3/4", "6/8")[i // 2 % 2], "bars": bars}
            row |= {"audio": f"audio/{i}.wav", "truth": truth if i % 2 else {}}
            row |= {"start": 0.5 * i, "track_duration": 0.5 * i + length / 25 + 1}
            (path / "audio").mkdir(exist_ok=True)
            tone = np.sin(2 * np.pi * (220 + 40 * i) * np.arange(length * HOP) / SAMPLE_RATE)
            sf.write(path / row["audio"], 0.5 * tone, SAMPLE_RATE)
        latents = None
        if vae is not None:
            slopes = np.arange(1, vae.latent_channels + 1)[:, None]
            latents = slopes + slopes * codes[0].repeat(r) / CODEBOOK_SIZE
        writer.add(row, codes, latents)
    if text_folder is None:
        text = {"name": "fake", "fingerprint": TEXT_FINGERPRINT, "dim": TEXT_DIM}
        embeddings = {text: rng.standard_normal((1 + len(text) % 3, TEXT_DIM)) for text in ["", *captions]}
    else:
        encoder = load_text_encoder(text_folder)
        text = {"name": str(text_folder), "fingerprint": encoder.fingerprint, "dim": encoder.dim}
        embeddings = {text: encoder.encode([text]).embeddings[0].numpy() for text in ["", *captions]}
    write_text_table(
        path / text_name(text["name"]), embeddings, lambda texts: [embeddings[text] for text in texts], text["dim"],
        text["fingerprint"],
    )  # fmt: skip
    writer.finish(text=text)
    return path


def write_audio_store(path: Path, segments: int = 12, sample_rate: int = SAMPLE_RATE, seconds: float = 1.5) -> Path:
    """A store with one tone per segment."""
    writer = StoreWriter(path, {"sample_rate": sample_rate}, sample_rate=sample_rate)
    (path / "audio").mkdir(parents=True)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    for i in range(segments):
        sf.write(path / f"audio/{i}.wav", 0.5 * np.sin(2 * np.pi * 40 * (i + 2) * time), sample_rate)
        split = "valid" if i % 4 == 3 else "train"
        row = {"id": f"s{i}", "split": split, "licence": "CC0-1.0", "duration": seconds, "audio": f"audio/{i}.wav"}
        writer.add(row)
    writer.finish()
    return path


def lm_config(store: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """The debug model on a store of `write_codes_store`."""
    fixed = ("experiment=debug", "model.d_model=16", "model.headdim=8", "model.d_state=4", "optim.lr=0.01")
    train = ("train.log_every=1", "train.precision=fp32")
    codes = (f"model.n_codebooks={N_CODEBOOKS}", f"model.codebook_size={CODEBOOK_SIZE}")
    sizes = (*codes, f"model.text_dim={TEXT_DIM}", f"data.frames={FRAMES}")
    return config.load(*fixed, *sizes, f"data.store={store}", f"run_dir={run_dir}", *train, *overrides)


def second_stage_config(store: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """A very small second stage on a store of `write_codes_store` with `small_codec`."""
    sizes = (
        f"model.n_codebooks={N_CODEBOOKS}", f"model.codebook_dim={CODEBOOK_DIM}", f"model.text_dim={TEXT_DIM}",
        "model.d_model=16", "model.n_layers=2", "model.headdim=8", "model.d_state=4", "model.n_heads=2",
        "model.time_dim=16", f"data.frames={FRAMES}", "data.batch_size=4", "optim.lr=0.01", "schedule.warmup_steps=5",
        "train.log_every=1", "train.precision=fp32", "train.eval_every=10", "train.eval_batches=2",
        "train.checkpoint_every=1000", "train.sample_seconds=1.5",
    )  # fmt: skip
    return config.load("experiment=tiny_denoiser", *sizes, f"data.store={store}", f"run_dir={run_dir}", *overrides)


def codec_config(store: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """A very small codec and its discriminator on a store of `write_audio_store`."""
    sizes = (
        f"codec.sample_rate={SAMPLE_RATE}", "codec.hop_length=96", "codec.window=192", "codec.n_codebooks=2",
        "codec.codebook_size=32", "codec.encoder_width=16", "codec.decoder_width=16", "codec.encoder_blocks=[1,1]",
        "codec.decoder_blocks=[1,1]", "data.batch_size=2", "data.seconds=1.0", "train.precision=fp32",
        "codec_training.adversarial_start=3", "codec_training.restart_every=2", "train.log_every=1",
        "train.eval_every=4", "train.eval_batches=1", "train.checkpoint_every=100", "train.sample_every=0",
    )  # fmt: skip
    return config.load("experiment=tiny_codec_start", *sizes, f"data.store={store}", f"run_dir={run_dir}", *overrides)
