"""Train the detectors on the built-in corpus and say how often they are right on held-out audio.

    python -m ssmttm.cli.train_attribute_classifiers --store data/builtin --codec tiny --out ssmttm/assets/detectors

Features of every clip are computed once and cached under the system's temporary folder. With a codec, half of the
training is on clips heard through it, since generated music always is. Training sees random windows of 10 s. Nothing is
chosen by the held-out splits (valid and test), so both are reported. A quarter of an hour on a core for 14 h of music.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import Codec, load_codec
from ssmttm.data.store import Store, open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.attributes.accuracy import accuracy, reconstruct_with_codec, truth_of
from ssmttm.evaluation.attributes.classifiers import ASSETS, MODES, WINDOW, AttributeClassifiers, pitch_class
from ssmttm.files import atomic_write

CLIP = 20  # seconds of a clip that are used; shorter segments are left out
_FAMILY_SECONDS = 5  # the family network hears half a window: it pools over time, and this is twice as quick
_STRETCH = 1.18  # onset curves are stretched by up to this factor, the tempo with them
_LOT = 400  # clips heard through the codec that are cached together
_BLUR = 1.2  # standard deviation of the tempo target in grid steps


@dataclass
class Clips:
    """Features of n clips, float16, and their labels."""

    mel: Tensor  # [n, MELS, CLIP * MEL_RATE]
    bands: Tensor  # [n, 3, PITCH_BINS, CLIP * PITCH_RATE]
    onsets: Tensor  # [n, 4, CLIP * ONSET_RATE]
    rows: Tensor  # [n] rows of the store

    @classmethod
    def join(cls, parts: Sequence["Clips"]) -> "Clips":
        """All clips of several lots."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def extract(store: Store, rows: np.ndarray, codec: Codec | None) -> Clips:
    """Features of the first 20 s of each row's audio, heard through the codec if there is one; cached on disk."""
    made_of = [Path(features.__file__).read_bytes(), b"" if codec is None else codec.fingerprint.encode()]
    names = store.manifest["content_hash"].take(pa.array(rows)).to_pylist()
    made_of += [(name or f"{store.fingerprint} {row}").encode() for name, row in zip(names, rows, strict=True)]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / "ssmttm-detectors" / f"{key}.safetensors"
    if not cache.is_file():
        embeddings = _hear(store, rows, codec)
        with atomic_write(cache) as aside:
            save_file(embeddings, aside)
    embeddings = load_file(cache)
    return Clips(rows=torch.from_numpy(rows)[embeddings.pop("place")], **embeddings)


def _hear(store: Store, rows: np.ndarray, codec: Codec | None) -> dict[str, Tensor]:
    """Clips' features, and `place`: which of the rows each clip is."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("mel", "bands", "onsets", "place")}
    task = f"features ({'true audio' if codec is None else 'through the codec'})"
    for place, row in enumerate(tqdm(rows.tolist(), desc=task, unit="clip")):
        wav, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
        if wav.shape[-1] < CLIP * features.SAMPLE_RATE:
            continue
        wav = wav[:, : CLIP * features.SAMPLE_RATE]
        wav = features.level(wav if codec is None else reconstruct_with_codec(codec, wav, features.SAMPLE_RATE))
        found["mel"].append(features.log_mel(wav).half())
        found["bands"].append(features.pitch_class_bands(features.log_frequency_spectrum(wav)).half())
        found["onsets"].append(features.onset_strength(wav).half())
        found["place"].append(torch.tensor([place]))
    if not found["place"]:
        raise UserError(f"{store.path} has no segment of {CLIP} s or more to learn from: prepare the built-in corpus")
    return {name: torch.cat(parts) for name, parts in found.items()}


def train(clips: Clips, n_true: int, truths: dict[int, dict[str, Any]], steps: int, batch: int, seed: int) -> AttributeClassifiers:
    """Fit the three networks together (their losses are summed; they share nothing).

    The first n_true clips are true audio; the rest, heard through a codec, come up about as often in all.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = clips.rows.tolist()
    families = sorted({truths[row]["lead"]["family"] for row in rows})
    family = torch.tensor([families.index(truths[row]["lead"]["family"]) for row in rows])
    bpm = torch.tensor([float(truths[row]["bpm"]) for row in rows])
    tonality = torch.tensor(
        [pitch_class(truths[row]["key"]) * len(MODES) + MODES.index(truths[row]["mode"]) for row in rows]
    )
    classifiers = AttributeClassifiers(families).train()
    optimiser = torch.optim.AdamW(classifiers.parameters(), lr=1.0, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.15)
    bar = tqdm(range(steps), desc="training", unit="step")
    coded = torch.arange(n_true, len(rows))
    epoch = torch.cat([torch.arange(n_true), coded.repeat(max(1, round(n_true / max(1, len(coded)))))])
    order = torch.empty(0, dtype=torch.long)
    for _ in bar:
        if len(order) < batch:
            order = torch.cat([order, epoch[torch.randperm(len(epoch), generator=generator)]])
        chosen, order = order[:batch], order[batch:]
        mel, bands, onsets, stretch = _draw(clips, chosen, generator)
        losses = (
            functional.cross_entropy(classifiers.family(mel), family[chosen], label_smoothing=0.05),
            functional.cross_entropy(classifiers.key(bands).flatten(1), tonality[chosen], label_smoothing=0.05),
            functional.cross_entropy(
                classifiers.tempo(features.tempogram(onsets)), _blurred(bpm[chosen] * stretch, classifiers.tempo.answers)
            ),
        )
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(zip(("family", "mode", "tempo"), (f"{loss.item():.3f}" for loss in losses), strict=True))
    return classifiers.eval()


def _draw(clips: Clips, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One random window of each chosen clip, a little disturbed: mel, bands, onsets, and the tempo's stretch [B]."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(chosen), generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(chosen), *shape, generator=generator)

    def crops(source: Tensor, size: int) -> Tensor:
        starts = uniform(0, source.shape[-1] - size + 1).long().tolist()
        return torch.stack([source[i, ..., s : s + size] for i, s in zip(chosen, starts, strict=True)]).float()

    mel = crops(clips.mel, _FAMILY_SECONDS * features.MEL_RATE)
    tilt = torch.linspace(-0.15, 0.15, features.MELS)[:, None]
    mel = mel + tilt * normal(1, 1) + 0.05 * normal(1, 1) + 0.03 * normal(*mel.shape[1:])
    bands = crops(clips.bands, int(WINDOW * features.PITCH_RATE)) * (1 + 0.15 * normal(3, 1, 1))
    stretch = _STRETCH ** uniform(-1, 1)
    size = int(WINDOW * features.ONSET_RATE)
    onsets = crops(clips.onsets, int(size * _STRETCH) + 2)
    places = torch.arange(size) * stretch[:, None]  # [B, size]
    left = places.long()[:, None].expand(-1, onsets.shape[1], -1)
    share = (places - places.floor())[:, None]
    onsets = onsets.gather(2, left) * (1 - share) + onsets.gather(2, left + 1) * share
    return mel, bands, onsets, stretch


def _blurred(bpm: Tensor, answers: Tensor) -> Tensor:
    """The target distribution over the answers: a bell around each tempo, on the log scale. [B] -> [B, answers]."""
    steps = (answers.log2() - bpm.log2()[:, None]) * features.TEMPI_PER_OCTAVE
    return (-0.5 * (steps / _BLUR).square()).softmax(-1)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="ssmttm.cli.train_attribute_classifiers", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="a built-in store that keeps its audio")
    parser.add_argument("--codec", default=None, help="hear a share of the clips through this codec too")
    parser.add_argument("--reconstructed", type=int, default=1600, help="how many clips that is (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where to write (default: the embedded detectors)")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    store = open_store(arguments.store)
    codec = load_codec(arguments.codec) if arguments.codec else None
    training = store.indices("train")
    lots = [extract(store, training, None)]
    if codec is not None:
        some = np.random.default_rng(arguments.seed).permutation(training)[: arguments.reconstructed]
        lots += [extract(store, np.sort(some[i : i + _LOT]), codec) for i in range(0, len(some), _LOT)]
    clips = Clips.join(lots)
    truths = {row: truth_of(store, row) for row in clips.rows.tolist()}
    classifiers = train(clips, len(lots[0].rows), truths, arguments.steps, arguments.batch, arguments.seed)

    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    report = accuracy(classifiers, store, held_out, codec)
    classifiers.card = {
        "window_seconds": WINDOW,
        "sample_rate": features.SAMPLE_RATE,
        "trained_on": {"store": store.fingerprint, "clips": len(lots[0].rows), "steps": arguments.steps},
        "codec": None if codec is None else {"name": codec.name, "fingerprint": codec.fingerprint},
        "seed": arguments.seed,
        "held_out": report,
    }
    classifiers.save(arguments.out)
    print(json.dumps(report, indent=1))
    print(arguments.out)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
