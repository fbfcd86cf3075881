"""Stores small enough to train on in seconds: random codes with captions, and short tones."""

from pathlib import Path

import numpy as np
import soundfile as sf
from omegaconf import DictConfig

from ssmttm import config
from ssmttm.data.store import text_name
from ssmttm.data.text_table import write_text_table
from ssmttm.data.writer import StoreWriter

N_CODEBOOKS, CODEBOOK_SIZE, TEXT_DIM, FRAMES = 4, 16, 8, 20
SAMPLE_RATE = 2400


def write_codes_store(path: Path, segments: int = 24, seed: int = 0) -> Path:
    """Codes [4, 14..20] in which each codebook repeats the one before it, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    codec = {
        "name": "fake", "fingerprint": "0" * 16, "sample_rate": SAMPLE_RATE, "frame_rate": 25.0,
        "n_codebooks": N_CODEBOOKS, "codebook_size": CODEBOOK_SIZE,
    }  # fmt: skip
    writer = StoreWriter(path, {"seed": seed}, codec=codec, sample_rate=SAMPLE_RATE)
    captions = [f"caption {i}" for i in range(6)]
    for i in range(segments):
        length = int(rng.integers(FRAMES - 6, FRAMES + 1))
        codes = np.repeat(rng.integers(0, CODEBOOK_SIZE, (1, length)), N_CODEBOOKS, axis=0)
        row = {
            "id": f"s{i}", "split": "valid" if i % 6 == 5 else "train", "licence": "CC0-1.0", "duration": length / 25,
            "captions": [captions[i % 6]], "tags": [f"tag {i % 6}", "music"],
        }  # fmt: skip
        writer.add(row, codes)
    embeddings = {text: rng.standard_normal((1 + len(text) % 3, TEXT_DIM)) for text in ["", *captions]}
    write_text_table(
        path / text_name("fake"), embeddings, lambda texts: [embeddings[text] for text in texts], TEXT_DIM, "1" * 16
    )
    writer.finish(text={"name": "fake", "fingerprint": "1" * 16, "dim": TEXT_DIM})
    return path


def write_audio_store(path: Path, segments: int = 12, sample_rate: int = SAMPLE_RATE, seconds: float = 1.5) -> Path:
    """One tone a segment."""
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


def codec_config(store: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """A very small codec and its discriminator on a store of `write_audio_store`."""
    sizes = (
        f"codec.sample_rate={SAMPLE_RATE}", "codec.hop_length=96", "codec.window=192", "codec.n_codebooks=2",
        "codec.codebook_size=32", "codec.encoder_width=16", "codec.decoder_width=16", "codec.encoder_blocks=[1,1]",
        "codec.decoder_blocks=[1,1]", "data.batch_size=2", "data.seconds=1.0", "train.precision=fp32",
        "codec_training.adversarial_start=3", "codec_training.revive_every=2", "train.log_every=1",
        "train.eval_every=4", "train.eval_batches=1", "train.checkpoint_every=100", "train.sample_every=0",
    )  # fmt: skip
    return config.load("experiment=tiny_codec", *sizes, f"data.store={store}", f"run_dir={run_dir}", *overrides)
