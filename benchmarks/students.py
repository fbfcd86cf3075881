"""Comparison of students of equal size and steps: weight transfer, losses, weighting, mixers, distilled guidance.

    ssmttm sweep sweep=tinyttm_tiny store=STORE
    python -m benchmarks.students STORE runs/sweeps/tinyttm_tiny

Cross-entropy of the whole test split, metrics of music for its captions, and costs, for the students and the teacher.
Writes benchmarks/results/students.json and prints the table; rows that it holds already are not measured again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy import stats

from benchmarks.held_out import ATTRIBUTES, FRAMES, HeldOutMusic
from benchmarks.paired import environment
from ssmttm import MusicPipeline, audio, config
from ssmttm.generation.loading import EMBEDDED, load_language_model, open_model_folder
from ssmttm.model_folder import SECOND_STAGE
from ssmttm.reports.tables import markdown_table
from ssmttm.training.tasks.lm import LanguageModelTask

RESULTS = Path(__file__).parent / "results" / "students.json"
CLIP_SECONDS = 10.0
METRICS = {"cross_entropy": 3, "fad": 0, "kad": 2, "kl": 2, **dict.fromkeys(ATTRIBUTES, 2)}  # decimals


@torch.no_grad()
def cross_entropy(model: str, store: str, batch_size: int = 8) -> float:
    """Cross-entropy of the test split, every segment once with one caption, in nats per code."""
    folder = open_model_folder(model)
    settings = config.load("experiment=tiny", f"data.store={store}", f"data.batch_size={batch_size}")
    settings = OmegaConf.merge(settings, {"model": folder.config.model, "pattern": folder.config.pattern})
    task = LanguageModelTask(settings)
    modules, loader = {"model": load_language_model(folder)}, task.loader("test", batch_size, 0, 1)
    batches = [loader.batch(n) for n in range(len(loader) // batch_size)]
    denominators = sum(task.loss_denominators(batch) for batch in batches)
    return sum(task.validation(modules, batch, denominators, 0)["cross_entropy"].item() for batch in batches)


def with_second_stage(model: str) -> MusicPipeline:
    """A student with its teacher's second stage, or the teacher."""
    return MusicPipeline.from_pretrained(model, "cpu", second_stage=EMBEDDED / SECOND_STAGE)


def music_metrics(model: str, music: HeldOutMusic, seed: int) -> dict[str, float]:
    """Metrics of music for the captions, sampled with the model's default guidance."""
    pipe = with_second_stage(model)
    captions = [prompt.caption for prompt in music.prompts]
    seeds = [1_000 * seed + i for i in range(len(captions))]
    audios = [
        pipe(captions[i : i + 16], FRAMES / music.codec.frame_rate, seeds=seeds[i : i + 16]).audios[:, 0]
        for i in range(0, len(captions), 16)
    ]
    return music.audio_metrics(torch.cat(audios))


def cost(model: str) -> dict[str, float]:
    """Parameters, FLOPs per second of music, and the real-time factor from a prompt to an audio file."""
    pipe = with_second_stage(model)
    passes = 1 if pipe.guidance_scale == 1 else 2
    frames = round(CLIP_SECONDS * pipe.codec.frame_rate)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(4):
            start = time.perf_counter()
            output = pipe("a slow waltz in D minor on a music box", CLIP_SECONDS, seeds=[seed])
            audio.write(Path(folder) / "clip.wav", output.audios[0], output.sample_rate)
            times.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in pipe.model.parameters()),
        "flops_per_second": passes * pipe.model.flops(frames, 16) / CLIP_SECONDS,
        "real_time_factor": float(np.median(times[1:])) / CLIP_SECONDS,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    music = HeldOutMusic(arguments.store, arguments.prompts)
    document = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    metadata = {"environment": environment(), "prompts": arguments.prompts, "store": music.store.fingerprint}
    if any(document.get(key, value) != value for key, value in metadata.items() if key != "environment"):
        raise SystemExit(f"{RESULTS} holds metrics of other prompts: move it away")
    students = document.setdefault("students", {})
    for student, seed, run in runs_of(arguments.sweep):
        row = students.setdefault(student, {"seeds": {}})
        if seed not in row["seeds"]:
            loss = cross_entropy(run, arguments.store)
            row["seeds"][seed] = {"cross_entropy": loss} | music_metrics(run, music, int(seed))
        if "parameters" not in row:
            row |= cost(run)
        RESULTS.write_text(json.dumps(document | metadata, indent=1) + "\n")
        print(student, seed, row["seeds"][seed], flush=True)
    print(markdown_table(table(students)))
    print(RESULTS)


def runs_of(sweep: Path) -> list[tuple[str, str, str]]:
    """(student, seed, run) of every finished job, and of the teacher."""
    runs = []
    for done in sorted(sweep.glob("jobs/*/done.json")):
        labels = json.loads((done.parent / "job.json").read_text())["labels"]
        runs.append((labels["student"], labels["seed"], str(done.parent / "run")))
    return [*runs, ("teacher", "0", "tiny_lm")]


def table(students: Mapping[str, Any]) -> list[list[str]]:
    """One row per student: means over seeds with 95 % intervals, then the costs."""
    rows = [["student", "seeds", *METRICS, "M parameters", "MFLOP per second", "real-time factor"]]
    for student, row in students.items():
        seeds = list(row["seeds"].values())
        cells = [interval([metrics[name] for metrics in seeds], decimals) for name, decimals in METRICS.items()]
        costs = [f"{row['parameters'] / 1e6:.2f}", f"{row['flops_per_second'] / 1e6:,.0f}"]
        rows.append([student, str(len(seeds)), *cells, *costs, f"{row['real_time_factor']:.3f}"])
    return rows


def interval(values: list[float], decimals: int) -> str:
    """Mean and half the width of its 95 % interval (Student's t); the mean alone for one value."""
    mean = f"{np.mean(values):.{decimals}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ± {half:.{decimals}f}"


if __name__ == "__main__":
    main()
