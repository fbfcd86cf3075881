"""`make demo`: from an empty folder to a page with music, through the same programs that everyone uses.

Composes a small corpus, trains a small model on it from scratch, gives that model and the embedded one the same prompts
and seeds, measures what came out, and writes one self-contained page.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ssmttm.data.store import open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.attributes.adherence import music_flatness
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers, AttributePrediction
from ssmttm.evaluation.music.audio_checks import check_audio, pairwise_difference
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.reports.html import Curve, Facts, Row, Section, Table, Text, TrainedModule, write_page

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "a slow waltz in D minor on a music box",
    "a fast techno track in A minor with a sawtooth synth lead",
    "a medium-tempo bossa nova in F major on a nylon-string guitar",
    "a lively jig in G major on a recorder",
    "a slow, solemn hymn in C major on a church organ",
    "a fast jazz swing tune in Bb major on a tenor saxophone",
)
DURATION, GUIDANCE, SEED = 10.0, 3.0, 7


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ssmttm.cli.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder of everything made (default: %(default)s)"
    )
    parser.add_argument("--hours", type=float, default=1.5, help="of music to compose (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: those of experiment=tiny)")
    arguments = parser.parse_args(argv)
    begun = time.perf_counter()
    store, run = arguments.out / "store", arguments.out / "run"

    _say(1, f"compose and render {arguments.hours} h of music, encode it with the embedded codec")
    _program("-m", "data_prep", "builtin", "--hours", str(arguments.hours), "--seed", "7", "--out", str(store))
    _say(2, "train a small language model on it from scratch")
    steps = [] if arguments.steps is None else [f"train.steps={arguments.steps}"]
    _program("train.py", "experiment=tiny", f"data.store={store}", f"run_dir={run}", *steps)
    _say(3, "give it and the embedded model the same prompts and seeds")
    pipelines = {"trained just now": MusicPipeline.from_pretrained(run), "embedded": MusicPipeline.from_pretrained()}
    seeds = [SEED + i for i in range(len(PROMPTS))]
    audios = {
        name: pipe(PROMPTS, duration=DURATION, guidance_scale=GUIDANCE, seeds=seeds).audios
        for name, pipe in pipelines.items()
    }
    _say(4, "listen to what came out")
    page = _page(arguments.out / "index.html", audios, pipelines["embedded"].sample_rate, store, run)
    print(f"\n{page} is ready after {(time.perf_counter() - begun) / 60:.1f} minutes: open it in a browser.")
    return 0


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def _program(*command: str) -> None:
    """Run one of the project's programs as a user would; its own output tells what it does."""
    print("      python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code == -2 or code == 130:
        raise KeyboardInterrupt("what was finished is kept; run the demo again to go on")
    if code:
        raise UserError(f"the demo stopped because `{command[0]}` failed (exit code {code}); its message stands above")


def _page(path: Path, audios: dict[str, torch.Tensor], sample_rate: int, store_path: Path, run: Path) -> Path:
    """Measure every sample and write the page; checks that fail are named on it and on the console."""
    store = open_store(store_path)
    flatness = music_flatness(store, np.concatenate([store.indices("valid"), store.indices("test")]))
    classifiers = AttributeClassifiers.from_pretrained()
    sections = [Section("The model trained just now", _training(run))]
    for index, prompt in enumerate(PROMPTS):
        trained_modules = []
        for name, batch in audios.items():
            wav = batch[index]
            check = check_audio(wav, sample_rate, flatness)
            embeddings = classifiers.predict(wav, sample_rate)[0]
            if not check.good:
                print(f"warning: {name}, “{prompt}”: {check}")
            trained_modules.append(TrainedModule(wav, sample_rate, name, _heard(embeddings) | {"sounds like music": check.good}))
        sections.append(Section(prompt, [Row(trained_modules)]))
    sections.append(Section("Different prompts, different music", [_differences(audios, sample_rate)]))
    return write_page(
        path,
        "Music from an empty folder",
        sections,
        lead="Everything here was made on this machine a moment ago: the corpus composed, the first model trained, all "
        "samples drawn. The embedded model is the same kind, trained longer. “Heard” is what small detectors make of "
        "the audio.",
    )


def _heard(detection: AttributePrediction) -> dict[str, str]:
    return {
        "heard instrument": detection.family,
        "heard tempo": f"{detection.bpm:.0f} bpm ({detection.tempo_class})",
        "heard key": f"{detection.key} {detection.mode}",
    }


def _training(run: Path) -> list[Text | Curve | Facts]:
    """The loss curve and the figures of the last logged step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    lines = {"training": [(row["step"], row["loss"]) for row in steps]}
    lines["held-out"] = [(row["step"], row["valid/loss"]) for row in rows if "valid/loss" in row]
    facts = {
        "steps": str(steps[-1]["step"]),
        "minutes": f"{steps[-1]['seconds'] / 60:.1f}",
        "loss, first to last": f"{steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}",
        "audio seconds a second": f"{steps[-1]['audio_seconds_per_second']:.0f}",
    }
    return [Curve(lines, "step", "cross-entropy, nats a code"), Facts(facts)]


def _differences(audios: dict[str, torch.Tensor], sample_rate: int) -> Table:
    """Mean and least distance between any two prompts' audio, by model."""
    rows = []
    for name, batch in audios.items():
        distance = pairwise_difference(list(batch), sample_rate)
        pairs = distance[~torch.eye(len(distance), dtype=torch.bool)]
        rows.append([name, f"{pairs.mean():.1f} dB", f"{pairs.min():.1f} dB"])
    return Table(["model", "mean difference between two prompts", "least"], rows)


if __name__ == "__main__":
    sys.exit(run_cli(main))
