"""`make demo`: from an empty folder to a page with music, by the same programs that every user runs.

Composes a small corpus, trains a small model on it from scratch, samples that model and the embedded one with the same
prompts and seeds, measures the samples, and writes one self-contained page.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmttm import threads
from ssmttm.data.store import open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.attributes.adherence import music_flatness
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers
from ssmttm.evaluation.music.audio_checks import (
    MIN_PERSISTENCE,
    AudioCheck,
    check_audio,
    flatness_limit,
    pairwise_difference,
)
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.reports import charts
from ssmttm.reports.page import embed_audio, write_page

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "a slow waltz in D minor on a music box",
    "a fast techno track in A minor with a sawtooth synth lead",
    "a medium-tempo bossa nova in F major on a nylon-string guitar",
    "a lively jig in G major on a recorder",
    "a slow, solemn hymn in C major on a church organ",
    "a fast jazz swing tune in Bb major on a tenor saxophone",
)
DURATION, SEED = 10.0, 7


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ssmttm.cli.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=1.5, help="hours of music to compose (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="training time, on any processor (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    store, run = arguments.out / "store", arguments.out / "run"

    _print_stage(1, f"compose and render {arguments.hours} h of music, encode it with the embedded codec")
    _run("-m", "data_prep", "builtin", "--hours", str(arguments.hours), "--seed", "7", "--out", str(store))
    _print_stage(2, f"train a small language model on it from scratch, for about {arguments.minutes:g} minutes")
    length = f"train.minutes={arguments.minutes}"
    smaller = ("model.n_codebooks=4", "model.d_model=192", "model.n_layers=6", "optim=muon", "optim.lr=4.0e-3")
    _run("train.py", "experiment=tiny", *smaller, f"data.store={store}", f"run_dir={run}", length)
    _print_stage(3, "sample it and the embedded model with the same prompts and seeds")
    pipelines = {
        "trained in this demo": MusicPipeline.from_pretrained(run),
        "embedded model": MusicPipeline.from_pretrained(),
    }
    threads.use_threads(1)  # small models
    seeds = [SEED + i for i in range(len(PROMPTS))]
    audios = {
        name: pipe(PROMPTS, duration=DURATION, seeds=seeds).audios
        for name, pipe in pipelines.items()
    }
    _print_stage(4, "measure the samples and write the page")
    sample_rate = pipelines["embedded model"].sample_rate
    page = write_demo_page(arguments.out / "index.html", audios, sample_rate, store, run)
    print(f"\n{page} is ready after {(time.perf_counter() - start) / 60:.1f} minutes: open it in a browser.")
    return 0


def write_demo_page(path: Path, audios: dict[str, torch.Tensor], sample_rate: int, store_path: Path, run: Path) -> Path:
    """Measure the samples of each model and write the page; failed checks stand on it and on the console.

    audios: by model [prompts, channels, S].
    """
    store = open_store(store_path)
    flatness = music_flatness(store, np.concatenate([store.indices("valid"), store.indices("test")]))
    classifiers = AttributeClassifiers.from_pretrained()
    prompts: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in PROMPTS}
    for model, batch in audios.items():
        for prompt, wav in zip(PROMPTS, batch, strict=True):
            check = check_audio(wav, sample_rate, flatness)
            if not check.good:
                print(f"warning: {model}, “{prompt}”: {check.summary()}")
            predicted = classifiers.predict(wav, sample_rate)[0]
            predictions = {
                "instrument": predicted.family,
                "tempo": f"{predicted.bpm:.0f} bpm ({predicted.tempo_class})",
                "key": f"{predicted.key} {predicted.mode}",
                **_checks(check, flatness),
            }
            prompts[prompt].append(
                {
                    "model": model,
                    "audio": embed_audio(wav, sample_rate),
                    "spectrogram": charts.spectrogram(wav, sample_rate),
                    "predictions": predictions,
                }
            )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    lines = {
        "training": [(row["step"], row["loss"]) for row in steps],
        "validation": [(row["step"], row["valid/loss"]) for row in rows if "valid/loss" in row],
    }
    training = {
        "steps": f"{steps[-1]['step']:,}",
        "minutes": f"{steps[-1]['seconds'] / 60:.1f}",
        "loss, first and last": f"{steps[0]['loss']:.2f}, {steps[-1]['loss']:.2f}",
        "seconds of audio per second": f"{steps[-1]['audio_seconds_per_second']:.0f}",
    }
    return write_page(
        path,
        "demo.html",
        title="Music from an empty folder",
        loss_curve=charts.curve(lines, "step", "cross-entropy, nats per code"),
        training=training,
        prompts=prompts,
        differences=_differences(audios, sample_rate),
    )


def _checks(check: AudioCheck, reference_flatness: float) -> dict[str, bool | str]:
    """What was checked of a sample, and the measured values."""
    return {
        "not silent": not check.silent,
        "not clipped": not check.clipped,
        "not noise": not check.noisy,
        "spectral flatness": f"{check.flatness:.3f} (noise: above {flatness_limit(reference_flatness):.3f})",
        "spectral persistence": f"{check.persistence:.2f} (noise: below {MIN_PERSISTENCE})",
    }


def _print_stage(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _run(*command: str) -> None:
    """Run one of the project's programs as a user does; its own output is shown."""
    print("      python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code == -2 or code == 130:
        raise KeyboardInterrupt("finished parts are kept; run the demo again to continue")
    if code:
        raise UserError(f"the demo stopped because `{command[0]}` failed (exit code {code}); see its message above")


def _differences(audios: dict[str, torch.Tensor], sample_rate: int) -> list[list[str]]:
    """Mean and minimum distance between the audio of two prompts, by model."""
    rows = [["model", "mean", "minimum"]]
    for model, batch in audios.items():
        distance = pairwise_difference(list(batch), sample_rate)
        pairs = distance[~torch.eye(len(distance), dtype=torch.bool)]
        rows.append([model, f"{pairs.mean():.1f} dB", f"{pairs.min():.1f} dB"])
    return rows


if __name__ == "__main__":
    with threads.spin_when_alone():
        sys.exit(run_cli(main))
