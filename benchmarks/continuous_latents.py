"""A second stage of continuous latents, whole: a stereo store, a small VAE, the store's latents, denoisers of several
seeds, and the kernel distance (KAD) of what they generate from held-out coarse codes.

    python -m benchmarks.continuous_latents FOLDER [--vae-steps N] [--steps N]

What is finished in FOLDER is kept. Writes benchmarks/results/continuous_latents.json and prints its table in Markdown.
Shapes: n clips, C channels, S samples, K codebooks, T frames.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paired import environment
from data_prep.builtin import compose
from data_prep.builtin.synth import render_stereo
from data_prep.cli import main as prepare
from ssmttm import audio, config
from ssmttm.codecs import load_codec
from ssmttm.codecs.metrics import stereo_errors
from ssmttm.codecs.vae import PatchedVAE, load_vae
from ssmttm.data import open_store
from ssmttm.evaluation import kernel_distance
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.export.model_folder import export
from ssmttm.generation.loading import load_denoiser, open_model_folder
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.reports.tables import markdown_table
from ssmttm.sweeps.report import interval
from ssmttm.text.condition import TextCondition
from ssmttm.training import loop

RESULTS = Path(__file__).parent / "results" / "continuous_latents.json"
CODEC, SEED, REFERENCE_SEED = "tiny_stereo", 7200, 8800
SECONDS = 8


class HeldOut:
    """Clips of the held-out splits with their coarse codes, and distances from other music of the composer."""

    def __init__(self, store: Path, n_coarse: int, reference_pieces: int) -> None:
        self.store, self.codec = open_store(store), load_codec(CODEC, n_coarse)
        self.store.require_codec(self.codec)
        rows = [int(row) for split in ("valid", "test") for row in self.store.indices(split)]
        rate, n_frames = self.codec.sample_rate, round(SECONDS * self.codec.frame_rate)
        wavs = [audio.read(self.store.audio_path(row), rate, mono=False)[0][:, : SECONDS * rate] for row in rows]
        codes = [torch.from_numpy(self.store.codes(row)[:n_coarse, :n_frames].astype(np.int64)) for row in rows]
        captions = [self.store.captions(row)[0] for row in rows]
        self.wav, self.codes = torch.stack(wavs), torch.stack(codes)  # [n, 2, S], [n, K, T]
        self.text, self.null = (self._text(some) for some in (captions, [""]))
        self.embedder = load_embedder("tiny")
        pieces = (torch.from_numpy(render_stereo(compose(REFERENCE_SEED, i), rate)) for i in range(reference_pieces))
        parts = [piece[:, 2 * n * SECONDS * rate :][:, : SECONDS * rate] for piece in pieces for n in range(2)]
        self.reference = self._embed(torch.stack(parts))

    def metrics(self, wav: Tensor) -> dict[str, float]:
        """KAD of clips [n, 2, S], each channel a clip of its own, and the error of the level between the channels."""
        level = stereo_errors(wav, self.wav[..., : wav.shape[-1]], self.codec.sample_rate).level
        return {"kad": kernel_distance(self._embed(wav), self.reference), "level": level}

    def decode(self, decode: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        """Decode frames [n, ..., T] one by one."""
        return torch.cat([decode(one) for one in frames.split(1)])[..., : self.wav.shape[-1]]

    def _text(self, captions: list[str]) -> TextCondition:
        return TextCondition.stack([torch.from_numpy(self.store.text(one).astype(np.float32)) for one in captions])

    def _embed(self, wav: Tensor) -> Tensor:
        mono = audio.resample(wav.flatten(0, 1), self.codec.sample_rate, self.embedder.sample_rate)
        return torch.cat([self.embedder.embed(part) for part in mono.split(8)]).flatten(0, 1).double()


def run_all(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Prepare, train and measure; the table and the results."""
    folder: Path = arguments.folder
    words = ["--codec", CODEC, "--workers", "1"]
    if not (folder / "audio" / "store.json").is_file():
        stereo = ["builtin", "--channels", "2", "--hours", str(arguments.hours), "--seed", str(SEED)]
        prepare([*stereo, "--out", str(folder / "audio"), *words])
    vae_run = train("tiny_oobleck", folder / "audio", folder / "vae_run", f"train.steps={arguments.vae_steps}")
    vae = load_vae(export(vae_run, folder / "vae", half=False))
    store = folder / f"store-{vae.fingerprint}"
    if not (store / "store.json").is_file():
        prepare(
            ["pack", "--root", str(folder / "audio"), "--out", str(store), "--latents", str(folder / "vae"), *words]
        )
    runs = [
        train("tiny_vae_stage2", store, folder / f"stage2-{vae.fingerprint}-{seed}", f"train.steps={arguments.steps}",
              f"seed={seed}")
        for seed in arguments.seeds
    ]  # fmt: skip
    return measure(arguments, store, folder / "vae_run", runs)


def train(experiment: str, store: Path, run_dir: Path, *overrides: str) -> Path:
    """Train a run, or continue it."""
    words = (f"data.store={store}", f"run_dir={run_dir}", *overrides)
    return loop.train(config.load(f"experiment={experiment}", *words))


def measure(
    arguments: argparse.Namespace, store: Path, vae_run: Path, runs: list[Path]
) -> tuple[list[list[str]], dict[str, Any]]:
    """The table: KAD and level errors of true music, reconstructions, the coarse codes alone, noise and the samples."""
    denoisers = [open_model_folder(run, task="diffusion") for run in runs]
    model = denoisers[0].config.model
    held_out = HeldOut(store, model.n_coarse_codebooks, arguments.pieces)
    vae = PatchedVAE(load_vae(held_out.store.vae_info["name"]), model.vae_frames)
    latents = torch.cat([vae.encode(wav) for wav in held_out.wav.split(1)])  # [n, C, T]
    mean, std = latents.mean((0, 2), keepdim=True), latents.std((0, 2), keepdim=True)
    noise = mean + std * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def generated(seed: int) -> Tensor:
        folder = denoisers[seed]
        settings = SecondStageConfig.from_config(folder.config)
        stage = SecondStage(load_denoiser(folder), held_out.codec, settings, vae)
        seeds = [1_000 * seed + item for item in range(len(held_out.codes))]
        return stage.generate(held_out.codes, SecondStageInputs(held_out.text, held_out.null, seeds))

    systems: dict[str, list[Callable[[], Tensor]]] = {
        "true music": [lambda: held_out.wav],
        "the VAE's reconstruction": [lambda: held_out.decode(vae.decode, latents)],
        "noise latents, decoded": [lambda: held_out.decode(vae.decode, noise)],
        "the coarse codes alone, decoded": [lambda: held_out.decode(held_out.codec.decode, held_out.codes)],
        "samples from the coarse codes": [
            lambda seed=seed: held_out.decode(vae.decode, generated(seed)) for seed in range(len(runs))
        ],
    }
    with torch.inference_mode():
        found = {name: [held_out.metrics(make()) for make in tqdm(makes, desc=name)] for name, makes in systems.items()}
    rows = [["", "KAD", "level between the channels, dB"]]
    for name, metrics in found.items():
        rows.append([name, *(interval(np.array([one[key] for one in metrics])) for key in ("kad", "level"))])
    losses = {"vae": first_and_last(vae_run), "denoisers": [first_and_last(run_of(run)) for run in runs]}
    return rows, {"clips": len(held_out.codes), "vae_steps": arguments.vae_steps, "steps": arguments.steps,
                  "seeds": arguments.seeds, "losses": losses, "systems": found}  # fmt: skip


def run_of(path: Path) -> Path:
    """The run folder of a run or one of its checkpoints."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def first_and_last(run: Path) -> list[float]:
    """The mean of the first and of the last four logged losses of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return [float(np.mean(losses[:4])), float(np.mean(losses[-4:]))]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.continuous_latents", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=1.0, help="of music (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=6000, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of the denoisers (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the denoisers (default: 0 1 2)")
    parser.add_argument("--pieces", type=int, default=20, help="of the reference music (default: %(default)s)")
    rows, results = run_all(parser.parse_args())
    RESULTS.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
