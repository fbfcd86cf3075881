"""Train the tiny audio-text embedder on the built-in corpus and report its held-out accuracy.

    python -m ssmttm.cli.train_embedder --store data/builtin --out DIR

Each segment is used as true audio and decoded from its codes, as generated music is. No setting depends on the held-out
splits (valid and test), so the metrics are reported over both. Takes about 25 minutes on one core for 14 h of music.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import Codec, load_codec
from ssmttm.data.store import Store, open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.attributes.accuracy import annotations_of
from ssmttm.evaluation.embedders.tiny import TinyEmbedder

CLIP = 20  # seconds used of a segment; shorter segments are skipped


def log_mels(store: Store, rows: np.ndarray, codec: Codec) -> tuple[Tensor, Tensor, np.ndarray]:
    """Log-mel spectrograms of the segments whose true audio and decoded codes both have at least CLIP seconds.

    Returns:
        Of true audio and of decoded codes, each float16 [n, N_MELS, CLIP * MEL_RATE], and the n rows of both.
    """
    true_mels, decoded_mels, kept = [], [], []
    for row in tqdm(rows.tolist(), desc="log-mel (true audio and decoded codes)", unit="clip"):
        true, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
        if true.shape[-1] < CLIP * features.SAMPLE_RATE:
            continue
        with torch.inference_mode():
            wav = codec.decode(torch.from_numpy(store.codes(row).astype(np.int64))[None])[0]
        decoded = audio.resample(wav.clone(), codec.sample_rate, features.SAMPLE_RATE)
        if decoded.shape[-1] < CLIP * features.SAMPLE_RATE:
            continue
        true_mels.append(_first_seconds(true))
        decoded_mels.append(_first_seconds(decoded))
        kept.append(row)
    if not kept:
        raise UserError(f"{store.path} has no segment of {CLIP} s or more: use a store of the built-in corpus")
    return torch.cat(true_mels), torch.cat(decoded_mels), np.array(kept)


def _first_seconds(wav: Tensor) -> Tensor:
    """Log-mel spectrogram of the first CLIP seconds: [1, S] -> float16 [1, N_MELS, T]."""
    return features.log_mel(features.rms_normalise(wav[:, : CLIP * features.SAMPLE_RATE])).half()


class Captions:
    """Captions of segments as means of their token states, from the store."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        self.pooled = []  # [captions, 384] of each segment
        for row in tqdm(rows.tolist(), desc="captions", unit="clip"):
            states = [torch.from_numpy(store.text(caption).astype(np.float32)) for caption in store.captions(row)]
            self.pooled.append(torch.stack([tokens.mean(0) for tokens in states]))

    def sample(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """A random caption of each segment: [B] -> [B, 384]."""
        texts = [self.pooled[i] for i in which.tolist()]
        return torch.stack([text[int(torch.randint(len(text), (), generator=generator))] for text in texts])


def train(
    mels: Sequence[Tensor], captions: Captions, styles: Tensor, classes: list[str], steps: int, batch: int
) -> TinyEmbedder:
    """Train the network: contrastive loss between clips and captions, cross-entropy of the style.

    Args:
        mels: log-mel spectrograms of the same n segments, of true audio and of decoded codes.
        styles: class of each segment, [n].
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    embedder = TinyEmbedder(classes).train()
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=1.0, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.15)
    frames, length = round(TinyEmbedder.seconds * features.MEL_RATE), mels[0].shape[-1]
    bar = tqdm(range(steps), desc="training", unit="step")
    for step in bar:
        which = torch.randperm(len(styles), generator=generator)[:batch]
        start = int(torch.randint(length - frames + 1, (), generator=generator))
        mel = mels[step % len(mels)][which, :, start : start + frames].float()
        hidden = embedder.head(embedder.pool(mel))
        audio_joint = F.normalize(embedder.audio_joint(hidden), dim=-1)
        text_joint = F.normalize(embedder.text_joint(captions.sample(which, generator)), dim=-1)
        similarity = embedder.log_scale.exp() * audio_joint @ text_joint.T  # [B, B]
        diagonal = torch.arange(batch)
        contrastive = (F.cross_entropy(similarity, diagonal) + F.cross_entropy(similarity.T, diagonal)) / 2
        style = F.cross_entropy(embedder.tag(hidden), styles[which], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        (contrastive + style).backward()
        torch.nn.utils.clip_grad_norm_(embedder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix(contrastive=f"{contrastive.item():.3f}", style=f"{style.item():.3f}")
    return embedder.eval()


@torch.inference_mode()
def measure(embedder: TinyEmbedder, mel: Tensor, captions: Captions, styles: Tensor) -> dict[str, float]:
    """Style accuracy, and retrieval of held-out segments by one of their captions."""
    frames = round(TinyEmbedder.seconds * features.MEL_RATE)
    windows = mel.float().unfold(-1, frames, frames).permute(0, 2, 1, 3)  # [n, W, MELS, frames]
    bar = tqdm(windows, desc="held-out accuracy", unit="clip")
    hidden = embedder.head(torch.stack([embedder.pool(clip) for clip in bar]))  # [n, W, D]
    predicted = embedder.tag(hidden).softmax(-1).mean(1).argmax(-1)
    audio_joint = F.normalize(F.normalize(embedder.audio_joint(hidden), dim=-1).mean(1), dim=-1)
    text_joint = F.normalize(embedder.text_joint(captions.sample(torch.arange(len(mel)), torch.Generator())), dim=-1)
    similarity = text_joint @ audio_joint.T  # [captions, clips]
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    mismatched = ~torch.eye(len(mel), dtype=torch.bool)
    metrics = {
        "style": float((predicted == styles).float().mean()),
        "recall_at_1": float((rank < 1).float().mean()),
        "recall_at_10": float((rank < 10).float().mean()),
        "matched_cosine": float(similarity.diagonal().mean()),
        "other_cosine": float(similarity[mismatched].mean()),
    }
    return {"n": len(mel), **{name: round(value, 4) for name, value in metrics.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a built-in store with audio")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    codec = load_codec(store.info["codec"]["name"])
    store.require_codec(codec)

    def prepared(rows: np.ndarray) -> tuple[list[Tensor], Captions, list[str]]:
        true, decoded, kept = log_mels(store, rows, codec)
        return [true, decoded], Captions(store, kept), [annotations_of(store, row)["style"] for row in kept.tolist()]

    mels, captions, names = prepared(store.indices("train"))
    classes = sorted({annotations_of(store, row)["style"] for row in range(len(store))})
    styles = torch.tensor([classes.index(name) for name in names])
    embedder = train(mels, captions, styles, classes, arguments.steps, min(arguments.batch, len(styles)))
    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    (true, decoded), captions, names = prepared(held_out)
    styles = torch.tensor([classes.index(name) for name in names])
    embedder.card = {
        "store": store.fingerprint,
        "codec": codec.fingerprint,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "held_out": {
            "true": measure(embedder, true, captions, styles),
            "reconstructed": measure(embedder, decoded, captions, styles),
        },
    }
    embedder.save(arguments.out)
    for source, metrics in embedder.card["held_out"].items():
        print(f"{source}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))
    print(arguments.out)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
