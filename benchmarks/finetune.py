"""The embedded model before and after learning one style from 20 songs: as an adapter, and with all weights.

python -m benchmarks.finetune --out runs/finetune_benchmark    (in a clone of the repository, an hour of one core)

The songs are built-in pieces of one style, prepared from a folder of audio files with captions.csv. The prompts name an
instrument, a key and a tempo, and no style; what is measured of the clips that they give:

- the kernel distance (KAD) and the Fréchet distance (FAD) in the embedded embedder to the songs, and to as many other
  pieces of the style, which were not trained on;
- how many clips have the prompted family of instruments, major or minor third, and tempo class, by the embedded
  attribute classifiers.
"""

import argparse
import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.builtin.captions import write_captions
from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.composition.compose import compose
from data_prep.builtin.corpus import SAMPLE_RATE
from data_prep.builtin.synth import render
from data_prep.cli import main as prepare
from ssmttm import MusicPipeline, audio, checkpoint, config
from ssmttm.adapters import merge, read_adapter
from ssmttm.evaluation import frechet_distance, kernel_distance
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers, third
from ssmttm.evaluation.embedders import load_embedder, mono_at
from ssmttm.export.model_folder import export
from ssmttm.training import loop

FAMILIES = {"piano": "piano", "flute": "flutes", "violin": "strings", "trumpet": "brass"}
TEMPI = {"slow": "slow", "mid-tempo": "medium", "fast": "fast"}
KEYS = ("C major", "A minor")
PROMPTS = [
    (
        f"{tempo} {instrument} music in {key}",
        {"family": FAMILIES[instrument], "tempo": TEMPI[tempo], "third": key.split()[1]},
    )
    for instrument, key, tempo in product(FAMILIES, KEYS, TEMPI)
]
SECONDS = 20.0  # of each song


def style_pieces(style: str, n: int, seed: int) -> list[Any]:
    """The first built-in pieces of a style in the corpus of a seed."""
    found, index = [], 0
    while len(found) < n:
        piece = compose(seed, index)
        index += 1
        if piece.truth["style"] == style:
            found.append(piece)
    return found


def write_songs(pieces: list[Any], folder: Path) -> list[Tensor]:
    """WAV files and captions.csv, unless they are there already; returns the samples [S]."""
    if (folder / "captions.csv").exists():
        return [audio.read(folder / f"{piece.id}.wav")[0][0] for piece in pieces]
    folder.mkdir(parents=True, exist_ok=True)
    songs, rows = [], []
    for piece in pieces:
        song = torch.from_numpy(render(piece, SAMPLE_RATE)[: round(SECONDS * SAMPLE_RATE)].astype(np.float32))
        audio.write(folder / f"{piece.id}.wav", song[None], SAMPLE_RATE)
        captions = write_captions(excerpt(piece, 0, SECONDS), piece.id)
        rows += [{"path": f"{piece.id}.wav", "caption": caption, "licence": "CC0-1.0"} for caption in captions]
        songs.append(song)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "caption", "licence"])
        writer.writeheader()
        writer.writerows(rows)
    return songs


class Measure:
    """Distances to the songs and prompt adherence of a model's clips."""

    def __init__(self, songs: list[Tensor], others: list[Tensor]) -> None:
        self.embedder, self.classifiers = load_embedder("tiny"), AttributeClassifiers.from_pretrained()
        self.references = {"songs": self._embed(songs), "others": self._embed(others)}

    def __call__(self, pipe: MusicPipeline, seed: int) -> dict[str, float]:
        prompts = [prompt for prompt, _ in PROMPTS]
        clips = pipe(prompts, duration=5.0, seeds=[1000 * seed + i for i in range(len(prompts))]).audios[:, 0]
        embeddings, result = self._embed(list(clips)), {}
        for name, reference in self.references.items():
            result[f"kad_{name}"] = kernel_distance(embeddings, reference)
            result[f"fad_{name}"] = frechet_distance(embeddings, reference)
        found = self.classifiers.predict(clips, pipe.codec.sample_rate)
        pairs = [(clip, wanted) for clip, (_, wanted) in zip(found, PROMPTS, strict=True)]
        result["family"] = float(np.mean([clip.family == wanted["family"] for clip, wanted in pairs]))
        result["tempo"] = float(np.mean([clip.tempo_class == wanted["tempo"] for clip, wanted in pairs]))
        result["third"] = float(np.mean([clip.third == third(wanted["third"]) for clip, wanted in pairs]))
        return result

    def _embed(self, clips: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [self.embedder.embed(mono_at(clip[None], SAMPLE_RATE, self.embedder))[0] for clip in clips]
            )


def train(experiment: str, store: Path, folder: Path, seed: int, steps: int) -> Path:
    """Fine-tune the embedded model, with small crops; returns the run."""
    return loop.train(config.load(
        f"experiment={experiment}", "init=tiny_lm", f"data.store={store}", f"run_dir={folder}", f"seed={seed}",
        f"train.steps={steps}", "data.frames=125", "train.eval_every=0", f"train.checkpoint_every={steps}",
        "train.trackers=[]",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--style", default="chiptune")
    parser.add_argument("--songs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experiments", nargs="+", default=["lora", "finetune"])
    options = parser.parse_args()
    songs = write_songs(style_pieces(options.style, options.songs, seed=77), options.out / "songs")
    others = write_songs(style_pieces(options.style, options.songs, seed=78), options.out / "others")
    store = options.out / "store"
    if not store.exists():
        prepare(["folder", "--root", str(options.out / "songs"), "--out", str(store), "--workers", "1"])
    measure, results = Measure(songs, others), options.out / "finetune.json"
    rows = json.loads(results.read_text()) if results.exists() else []  # of a run that was stopped

    def record(model: str, seed: int, pipe: MusicPipeline, **extra: float) -> None:
        rows.append({"model": model, "seed": seed, **extra, **measure(pipe, seed)})
        print(json.dumps(rows[-1]), flush=True)
        results.write_text(json.dumps(rows, indent=1) + "\n")

    def is_missing(model: str, seed: int) -> bool:
        return all((row["model"], row["seed"]) != (model, seed) for row in rows)

    for seed in range(options.seeds):
        if is_missing("before", seed):
            record("before", seed, MusicPipeline.from_pretrained())
    for experiment, seed in product(options.experiments, range(options.seeds)):
        models = ["all weights"] if experiment == "finetune" else [f"adapter, strength {s}" for s in (1.0, 0.5)]
        missing = [model for model in models if is_missing(model, seed)]
        if not missing:
            continue
        run = train(experiment, store, options.out / f"{experiment}-{seed}", seed, options.steps)
        minutes = checkpoint.read_state(checkpoint.find_model(run))["seconds"] / 60
        folder = export(run, options.out / f"{experiment}-{seed}-exported")
        if experiment == "finetune":
            record("all weights", seed, MusicPipeline.from_pretrained(folder), minutes=minutes)
            continue
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for model in missing:
            pipe = MusicPipeline.from_pretrained()
            merge(pipe.model, [(read_adapter(folder), float(model.rpartition(" ")[2]))])
            record(model, seed, pipe, minutes=minutes, megabytes=size)


if __name__ == "__main__":
    main()
