"""Train the attribute classifiers on the built-in corpus and report their accuracy on held-out audio.

    python -m ssmttm.cli.train_attribute_classifiers --store data/builtin --codec tiny --out DIR

The features of every clip are computed once and cached under the system's temporary folder. With a codec, half of the
training clips are codec reconstructions, as generated music is: decoded from the store's codes if they are this
codec's. Training uses random windows of 10 s. No setting depends on the held-out splits (valid and test), so the
accuracy is reported over both. Takes a quarter of an hour on one core for 14 h of music; a few minutes to train some of
the shipped networks further (`--init shipped --networks tempo key`).
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
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
from ssmttm.evaluation.attributes.accuracy import accuracy, annotations_of, reconstruct_with_codec
from ssmttm.evaluation.attributes.classifiers import ASSETS, MODES, WINDOW, AttributeClassifiers, pitch_class
from ssmttm.files import atomic_write

CLIP = 20  # seconds used of a segment; shorter segments are skipped
_FAMILY_SECONDS = 5  # half a window: the family network pools over time, and training is twice as fast
_STRETCH = 1.18  # largest time stretch of onset curves and tempo
_CACHED_ROWS = 400  # codec reconstructions per cache file
NETWORKS = ("family", "tempo", "key")
_TARGET_DEVIATION = 1.2  # of the tempo target, in grid steps


@dataclass
class Clips:
    """Features of n clips, float16, and their labels. Features of a network that is not trained are empty, [n, 0]."""

    mel: Tensor  # family: [n, N_MELS, CLIP * MEL_RATE]
    bands: Tensor  # key: [n, 3, PITCH_BINS, CLIP * PITCH_RATE]
    onsets: Tensor  # tempo: [n, 4, CLIP * ONSET_RATE]
    rows: Tensor  # [n] rows of the store

    @classmethod
    def join(cls, parts: Sequence["Clips"]) -> "Clips":
        """Concatenate clips."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def extract(store: Store, rows: np.ndarray, codec: Codec | None, networks: Sequence[str] = NETWORKS) -> Clips:
    """Features of the first 20 s of each row's audio, reconstructed by the codec if given; cached on disk."""
    identity = [f"features {features.VERSION} {' '.join(sorted(networks))}".encode()]
    identity.append(b"" if codec is None else codec.fingerprint.encode())
    names = store.manifest["content_hash"].take(pa.array(rows)).to_pylist()
    identity += [(name or f"{store.fingerprint} {row}").encode() for name, row in zip(names, rows, strict=True)]
    key = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / "ssmttm-attribute-features" / f"{key}.safetensors"
    if not cache.is_file():
        with atomic_write(cache) as temporary:
            save_file(_compute_features(store, rows, codec, networks), temporary)
    tensors = load_file(cache)
    return Clips(rows=torch.from_numpy(rows)[tensors.pop("index")], **tensors)


def _compute_features(
    store: Store, rows: np.ndarray, codec: Codec | None, networks: Sequence[str]
) -> dict[str, Tensor]:
    """Features of the clips for these networks, and `index`: the position of each clip in `rows`."""
    none = torch.empty(1, 0, dtype=torch.float16)
    found: dict[str, list[Tensor]] = {name: [] for name in ("mel", "bands", "onsets", "index")}
    title = f"features ({'true audio' if codec is None else 'codec reconstruction'})"
    for index, row in enumerate(tqdm(rows.tolist(), desc=title, unit="clip")):
        wav, _ = audio.read(store.audio_path(row), features.SAMPLE_RATE)
        if wav.shape[-1] < CLIP * features.SAMPLE_RATE:
            continue
        wav = wav[:, : CLIP * features.SAMPLE_RATE]
        wav = features.rms_normalise(wav if codec is None else _reconstructed(store, row, wav, codec))
        found["mel"].append(features.log_mel(wav).half() if "family" in networks else none)
        found["bands"].append(_pitch_bands(wav).half() if "key" in networks else none)
        found["onsets"].append(features.onset_strength(wav).half() if "tempo" in networks else none)
        found["index"].append(torch.tensor([index]))
    if not found["index"]:
        raise UserError(f"{store.path} has no segment of {CLIP} s or more: use a store of the built-in corpus")
    return {name: torch.cat(parts) for name, parts in found.items()}


def _pitch_bands(wav: Tensor) -> Tensor:
    return features.pitch_class_bands(features.log_frequency_spectrum(wav))


def _reconstructed(store: Store, row: int, wav: Tensor, codec: Codec) -> Tensor:
    """Audio of a row [1, S] as the codec gives it back; the store's own codes spare the encoding."""
    if (store.info.get("codec") or {}).get("fingerprint") != codec.fingerprint:
        return reconstruct_with_codec(codec, wav, features.SAMPLE_RATE)
    n_frames = int(CLIP * codec.frame_rate)
    codes = torch.from_numpy(store.codes(row)[:, :n_frames].astype(np.int64))[None]  # [1, K, T]
    with torch.inference_mode():
        decoded = codec.decode(codes)[0].clone()
    return audio.resample(decoded, codec.sample_rate, features.SAMPLE_RATE)[:, : wav.shape[-1]]


def train(
    clips: Clips,
    n_true: int,
    annotations: dict[int, dict[str, Any]],
    steps: int,
    batch: int,
    seed: int,
    init: AttributeClassifiers | None = None,
    networks: Sequence[str] = NETWORKS,
) -> AttributeClassifiers:
    """Train the networks; their losses are summed and they share no parameters.

    The first n_true clips are true audio. The codec reconstructions are repeated to about the same number.

    Args:
        init: classifiers to start from.
        networks: those to train, some of NETWORKS; the others stay as they are.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = clips.rows.tolist()
    families = init.families if init else sorted({annotations[row]["lead"]["family"] for row in rows})
    classifiers = AttributeClassifiers(families)
    if init is not None:
        classifiers.load_state_dict(init.state_dict())
    losses = _losses(classifiers.train(), clips, annotations, generator)
    trained = [parameter for name in networks for parameter in getattr(classifiers, name).parameters()]
    optimiser = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.15)
    bar = tqdm(range(steps), desc="training", unit="step")
    reconstructed = torch.arange(n_true, len(rows))
    repeats = max(1, round(n_true / max(1, len(reconstructed))))
    epoch = torch.cat([torch.arange(n_true), reconstructed.repeat(repeats)])
    order = torch.empty(0, dtype=torch.long)
    for _ in bar:
        if len(order) < batch:
            order = torch.cat([order, epoch[torch.randperm(len(epoch), generator=generator)]])
        chosen, order = order[:batch], order[batch:]
        found = {name: losses[name](chosen) for name in networks}
        optimiser.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in found.items()})
    return classifiers.eval()


def _losses(
    classifiers: AttributeClassifiers,
    clips: Clips,
    annotations: dict[int, dict[str, Any]],
    generator: torch.Generator,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The loss of each network on an augmented random window of each chosen clip, a function of their positions [B]."""
    truths = [annotations[row] for row in clips.rows.tolist()]
    family = torch.tensor([classifiers.families.index(truth["lead"]["family"]) for truth in truths])
    bpm = torch.tensor([float(truth["bpm"]) for truth in truths])
    key_and_mode = torch.tensor([pitch_class(t["key"]) * len(MODES) + MODES.index(t["mode"]) for t in truths])

    def of_family(chosen: Tensor) -> Tensor:
        logits = classifiers.family(_mel_windows(clips.mel, chosen, generator))
        return functional.cross_entropy(logits, family[chosen], label_smoothing=0.05)

    def of_key(chosen: Tensor) -> Tensor:
        bands = _crops(clips.bands, chosen, int(WINDOW * features.PITCH_RATE), generator)
        bands = bands * (1 + 0.15 * torch.randn(len(chosen), 3, 1, 1, generator=generator))
        return functional.cross_entropy(classifiers.key(bands).flatten(1), key_and_mode[chosen], label_smoothing=0.05)

    def of_tempo(chosen: Tensor) -> Tensor:
        onsets, stretch = _stretched_windows(clips.onsets, chosen, generator)
        target = _tempo_target(bpm[chosen] * stretch, classifiers.tempo.bpm)
        return functional.cross_entropy(classifiers.tempo(features.tempogram(onsets)), target)

    return {"family": of_family, "tempo": of_tempo, "key": of_key}


def _crops(source: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random window of each chosen clip: [n, ..., T] -> [B, ..., size]."""
    starts = torch.randint(source.shape[-1] - size + 1, (len(chosen),), generator=generator).tolist()
    return torch.stack([source[i, ..., s : s + size] for i, s in zip(chosen, starts, strict=True)]).float()


def _mel_windows(source: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Random windows of log-mel with random tilt, level and noise: [B, N_MELS, T]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(chosen), *shape, generator=generator)

    mel = _crops(source, chosen, _FAMILY_SECONDS * features.MEL_RATE, generator)
    tilt = torch.linspace(-0.15, 0.15, features.N_MELS)[:, None]
    return mel + tilt * normal(1, 1) + 0.05 * normal(1, 1) + 0.03 * normal(*mel.shape[1:])


def _stretched_windows(source: Tensor, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of onset curves [B, N, T], randomly stretched in time, and the tempo's factor [B]."""
    stretch = _STRETCH ** (2 * torch.rand(len(chosen), generator=generator) - 1)
    size = int(WINDOW * features.ONSET_RATE)
    onsets = _crops(source, chosen, int(size * _STRETCH) + 2, generator)
    positions = torch.arange(size) * stretch[:, None]  # [B, size]
    left = positions.long()[:, None].expand(-1, onsets.shape[1], -1)
    fraction = (positions - positions.floor())[:, None]
    return onsets.gather(2, left) * (1 - fraction) + onsets.gather(2, left + 1) * fraction, stretch


def _tempo_target(bpm: Tensor, grid: Tensor) -> Tensor:
    """Target distribution over the tempo grid, Gaussian around each tempo on the log scale. [B] -> [B, G]."""
    steps = (grid.log2() - bpm.log2()[:, None]) * features.TEMPI_PER_OCTAVE
    return (-0.5 * (steps / _TARGET_DEVIATION).square()).softmax(-1)


def _recipe(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command with the settings that differ from the defaults, without the folders of this machine."""
    words = ["python -m ssmttm.cli.train_attribute_classifiers --store STORE"]
    for name, value in vars(arguments).items():
        if name not in ("store", "out") and value != parser.get_default(name):
            values = " ".join(map(str, value)) if isinstance(value, list) else Path(str(value)).name
            words.append(f"--{name.replace('_', '-')} {values}")
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save the classifiers."""
    parser = argparse.ArgumentParser(prog="ssmttm.cli.train_attribute_classifiers", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="a built-in store with audio")
    parser.add_argument("--codec", default=None, help="also train on reconstructions by this codec")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="default: all")
    parser.add_argument("--clips", type=int, default=None, help="first clips of the split to train on (default: all)")
    parser.add_argument("--reconstructed", type=int, default=1600, help="reconstructed clips (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="output folder (default: the shipped classifiers)")
    parser.add_argument("--held-out", type=int, default=None, help="windows to measure on (default: all held out)")
    parser.add_argument("--init", default=None, help="a folder of classifiers to start from, or `shipped`")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    store = open_store(arguments.store)
    codec = load_codec(arguments.codec) if arguments.codec else None
    first = None if arguments.init == "shipped" else arguments.init
    init = AttributeClassifiers.from_pretrained(first) if arguments.init else None
    training, networks = store.indices("train")[: arguments.clips], arguments.networks
    parts = [extract(store, training, None, networks)]
    if codec is not None:
        chosen = np.random.default_rng(arguments.seed).permutation(training)[: arguments.reconstructed]
        for start in range(0, len(chosen), _CACHED_ROWS):
            parts.append(extract(store, np.sort(chosen[start : start + _CACHED_ROWS]), codec, networks))
    clips = Clips.join(parts)
    annotations = {row: annotations_of(store, row) for row in clips.rows.tolist()}
    steps, batch, seed = arguments.steps, arguments.batch, arguments.seed
    classifiers = train(clips, len(parts[0].rows), annotations, steps, batch, seed, init, networks)

    held_out = np.concatenate([store.indices("test"), store.indices("valid")])[: arguments.held_out]
    report = accuracy(classifiers, store, held_out, codec)
    classifiers.card = {
        "window_seconds": WINDOW,
        "sample_rate": features.SAMPLE_RATE,
        "trained_on": {
            "store": store.fingerprint,
            "clips": len(parts[0].rows),
            "reconstructed": len(clips.rows) - len(parts[0].rows),
            "steps": steps,
            "networks": networks,
            "init": init and init.fingerprint,
            "hours": round(len(parts[0].rows) * CLIP / 3600, 2),
        },
        "licence": "CC0-1.0",
        "recipe": _recipe(parser, arguments),
        "codec": None if codec is None else {"name": codec.name, "fingerprint": codec.fingerprint},
        "seed": seed,
        "held_out": report,
    }
    classifiers.save(arguments.out)
    print(json.dumps(report, indent=1))
    print(arguments.out)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
