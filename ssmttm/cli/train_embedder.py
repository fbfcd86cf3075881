"""Train the tiny audio-text embedder on the built-in corpus and say how well it does on held-out audio.

    python -m ssmttm.cli.train_embedder --store data/builtin --out ssmttm/assets/embedder

Each segment is heard as it is and as its codes sound, since generated music always comes through a codec. Nothing is
chosen by the held-out splits (valid and test), so the figures over both are reported. Some 25 minutes on a core for
14 h of music.
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
from ssmttm.evaluation.attributes.accuracy import truth_of
from ssmttm.evaluation.embedders.tiny import TinyEmbedder

CLIP = 20  # seconds of a segment that are used; shorter ones are left out


def embed_clips(store: Store, rows: np.ndarray, codec: Codec | None) -> tuple[Tensor, np.ndarray]:
    """Log-mel spectrograms of the segments that are long enough, as they are or as their codes sound.

    Returns:
        float16 [n, MELS, CLIP * MEL_RATE], and the n rows.
    """
    found, kept = [], []
    for row in tqdm(rows.tolist(), desc=f"hearing {'true audio' if codec is None else 'codes'}", unit="clip"):
        if codec is None:
            wav, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
        else:
            with torch.inference_mode():
                decoded = codec.decode(torch.from_numpy(store.codes(row).astype(np.int64))[None])[0]
            wav = audio.resample(decoded.clone(), codec.sample_rate, features.SAMPLE_RATE)
        if wav.shape[-1] >= CLIP * features.SAMPLE_RATE:
            found.append(features.log_mel(features.level(wav[:, : CLIP * features.SAMPLE_RATE])).half())
            kept.append(row)
    if not found:
        raise UserError(f"{store.path} has no segment of {CLIP} s or more to learn from: prepare the built-in corpus")
    return torch.cat(found), np.array(kept)


class Captions:
    """The captions of segments as means of their token states, which the store holds."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        self.of_row = [
            torch.stack([torch.from_numpy(store.text(words).astype(np.float32)).mean(0) for words in store.captions(r)])
            for r in tqdm(rows.tolist(), desc="captions", unit="clip")
        ]

    def choose(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """One caption, at random, of each segment: [B] -> [B, 384]."""
        texts = [self.of_row[i] for i in which.tolist()]
        return torch.stack([text[int(torch.randint(len(text), (), generator=generator))] for text in texts])


def train(
    hearings: Sequence[Tensor], captions: Captions, styles: Tensor, classes: list[str], steps: int, batch: int
) -> TinyEmbedder:
    """Fit the network: contrastive loss between clips and captions, cross-entropy of the style.

    Args:
        hearings: the same n segments as spectrograms, as they are and as their codes sound.
        styles: class of each segment, [n].
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    embedder = TinyEmbedder(classes).train()
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=1.0, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.15)
    frames, length = round(TinyEmbedder.seconds * features.MEL_RATE), hearings[0].shape[-1]
    bar = tqdm(range(steps), desc="training", unit="step")
    for step in bar:
        which = torch.randperm(len(styles), generator=generator)[:batch]
        start = int(torch.randint(length - frames + 1, (), generator=generator))
        mel = hearings[step % len(hearings)][which, :, start : start + frames].float()
        hidden = embedder.head(embedder.pooled(mel))
        sound = F.normalize(embedder.audio_joint(hidden), dim=-1)
        words = F.normalize(embedder.text_joint(captions.choose(which, generator)), dim=-1)
        likeness = embedder.log_scale.exp() * sound @ words.T  # [B, B]
        diagonal = torch.arange(batch)
        contrast = (F.cross_entropy(likeness, diagonal) + F.cross_entropy(likeness.T, diagonal)) / 2
        tags = F.cross_entropy(embedder.tag(hidden), styles[which], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        (contrast + tags).backward()
        torch.nn.utils.clip_grad_norm_(embedder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix(contrast=f"{contrast.item():.3f}", tags=f"{tags.item():.3f}")
    return embedder.eval()


@torch.inference_mode()
def measure(embedder: TinyEmbedder, mel: Tensor, captions: Captions, styles: Tensor) -> dict[str, float]:
    """How well held-out segments are named, and found by one of their captions among all."""
    frames = round(TinyEmbedder.seconds * features.MEL_RATE)
    cut = mel.float().unfold(-1, frames, frames).permute(0, 2, 1, 3)  # [n, W, MELS, frames]
    bar = tqdm(cut, desc="held-out accuracy", unit="clip")
    hidden = embedder.head(torch.stack([embedder.pooled(clip) for clip in bar]))  # [n, W, D]
    named = embedder.tag(hidden).softmax(-1).mean(1).argmax(-1)
    sound = F.normalize(F.normalize(embedder.audio_joint(hidden), dim=-1).mean(1), dim=-1)
    words = F.normalize(embedder.text_joint(captions.choose(torch.arange(len(mel)), torch.Generator())), dim=-1)
    likeness = words @ sound.T  # [captions, clips]
    place = (likeness > likeness.diagonal()[:, None]).sum(1)
    apart = ~torch.eye(len(mel), dtype=torch.bool)
    metrics = {
        "style": float((named == styles).float().mean()),
        "recall_at_1": float((place < 1).float().mean()),
        "recall_at_10": float((place < 10).float().mean()),
        "matched_cosine": float(likeness.diagonal().mean()),
        "other_cosine": float(likeness[apart].mean()),
    }
    return {"n": len(mel), **{name: round(value, 4) for name, value in metrics.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a built-in store that keeps its audio")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    codec = load_codec(store.info["codec"]["name"])
    store.require_codec(codec)

    def prepared(rows: np.ndarray) -> tuple[list[Tensor], Captions, list[str]]:
        (true, kept), (coded, _) = embed_clips(store, rows, None), embed_clips(store, rows, codec)
        return [true, coded], Captions(store, kept), [truth_of(store, row)["style"] for row in kept.tolist()]

    hearings, captions, names = prepared(store.indices("train"))
    classes = sorted({truth_of(store, row)["style"] for row in range(len(store))})
    styles = torch.tensor([classes.index(name) for name in names])
    embedder = train(hearings, captions, styles, classes, arguments.steps, min(arguments.batch, len(styles)))
    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    (true, coded), captions, names = prepared(held_out)
    styles = torch.tensor([classes.index(name) for name in names])
    embedder.card = {
        "store": store.fingerprint,
        "codec": codec.fingerprint,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "held_out": {
            "true": measure(embedder, true, captions, styles),
            "reconstruct_with_codec": measure(embedder, coded, captions, styles),
        },
    }
    embedder.save(arguments.out)
    for hearing, metrics in embedder.card["held_out"].items():
        print(f"{hearing}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))
    print(arguments.out)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
