"""Students of one size and number of steps: what transfer, losses, weightings, mixers and guidance within are worth.

    ssmttm sweep sweep=tinyttm_tiny store=STORE
    python -m benchmarks.students STORE runs/sweeps/tinyttm_tiny

Cross-entropy of the whole test split, the judge's figures of music for its captions, and what each costs; the teacher
beside them. Writes benchmarks/results/students.json and prints the table; what it holds is not measured again.
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

from benchmarks.judge import ATTRIBUTES, FRAMES, Judge
from benchmarks.paired import environment
from ssmttm import MusicPipeline, audio, config
from ssmttm.evaluation.metrics.metric import markdown
from ssmttm.generation.loading import load_model, open_model_folder
from ssmttm.training.tasks.lm import LanguageModelTask

RESULTS = Path(__file__).parent / "results" / "students.json"
PIECE = 10.0  # seconds
FIGURES = {"cross_entropy": 3, "fad": 0, "kad": 2, "kl": 2, **dict.fromkeys(ATTRIBUTES, 2)}  # and their decimals


@torch.no_grad()
def cross_entropy(model: str, store: str, batch_size: int = 8) -> float:
    """Of every segment of the test split once, under its first caption of that seed; nats a code."""
    folder = open_model_folder(model)
    settings = config.load("experiment=tinyttm_lm", "task=lm", f"data.store={store}", f"data.batch_size={batch_size}")
    settings = OmegaConf.merge(settings, {"model": folder.config.model, "pattern": folder.config.pattern})
    task = LanguageModelTask(settings)
    trained_modules, loader = {"model": load_model(folder)}, task.loader("test", batch_size, 0, 1)
    batches = [loader.batch(n) for n in range(len(loader) // batch_size)]
    counts = sum(task.counts(batch) for batch in batches)
    return sum(task.validation(trained_modules, batch, counts, 0)["cross_entropy"].item() for batch in batches)


def embeddings(model: str, judge: Judge, seed: int) -> dict[str, float]:
    """What the judge says of music for its captions, sampled with the model's own guidance."""
    pipe = MusicPipeline.from_pretrained(model, "cpu")
    captions = [prompt.caption for prompt in judge.prompts]
    seeds = [1_000 * seed + i for i in range(len(captions))]
    made = [
        pipe(captions[i : i + 16], FRAMES / judge.codec.frame_rate, seeds=seeds[i : i + 16]).audios[:, 0]
        for i in range(0, len(captions), 16)
    ]
    return judge.embeddings(torch.cat(made))


def cost(model: str) -> dict[str, float]:
    """Parameters, FLOPs of a second of music, and the real-time factor from a prompt to a file on the disk."""
    pipe = MusicPipeline.from_pretrained(model, "cpu")
    passes = 1 if pipe.guidance_scale == 1 else 2
    frames = round(PIECE * pipe.codec.frame_rate)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(4):
            begun = time.perf_counter()
            made = pipe("a slow waltz in D minor on a music box", PIECE, seeds=[seed])
            audio.write(Path(folder) / "piece.wav", made.audios[0], made.sample_rate)
            times.append(time.perf_counter() - begun)
    return {
        "parameters": sum(parameter.numel() for parameter in pipe.model.parameters()),
        "flops_a_second": passes * pipe.model.flops(frames, 16) / PIECE,
        "real_time_factor": float(np.median(times[1:])) / PIECE,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    judge = Judge(arguments.store, arguments.prompts)
    document = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    facts = {"environment": environment(), "prompts": arguments.prompts, "store": judge.store.fingerprint}
    if any(document.get(key, value) != value for key, value in facts.items() if key != "environment"):
        raise SystemExit(f"{RESULTS} holds figures of other prompts: move it away")
    found = document.setdefault("students", {})
    for student, seed, run in runs_of(arguments.sweep):
        row = found.setdefault(student, {"seeds": {}})
        if seed not in row["seeds"]:
            loss = cross_entropy(run, arguments.store)
            row["seeds"][seed] = {"cross_entropy": loss} | embeddings(run, judge, int(seed))
        if "parameters" not in row:
            row |= cost(run)
        RESULTS.write_text(json.dumps(document | facts, indent=1) + "\n")
        print(student, seed, row["seeds"][seed], flush=True)
    print(markdown(table(found)))
    print(RESULTS)


def runs_of(sweep: Path) -> list[tuple[str, str, str]]:
    """(student, seed, run) of every job that is done, and of the teacher."""
    runs = []
    for done in sorted(sweep.glob("jobs/*/done.json")):
        labels = json.loads((done.parent / "job.json").read_text())["labels"]
        runs.append((labels["student"], labels["seed"], str(done.parent / "run")))
    return [*runs, ("teacher", "0", "tiny_lm")]


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a student: means over seeds with 95 % intervals, then the costs."""
    rows = [["student", "seeds", *FIGURES, "M parameters", "MFLOP a second", "real-time factor"]]
    for student, row in found.items():
        seeds = list(row["seeds"].values())
        cells = [interval([metrics[name] for metrics in seeds], decimals) for name, decimals in FIGURES.items()]
        costs = [f"{row['parameters'] / 1e6:.2f}", f"{row['flops_a_second'] / 1e6:,.0f}"]
        rows.append([student, str(len(seeds)), *cells, *costs, f"{row['real_time_factor']:.3f}"])
    return rows


def interval(values: list[float], decimals: int) -> str:
    """Mean and half the width of its 95 % interval (Student's t), which one value has not."""
    mean = f"{np.mean(values):.{decimals}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ± {half:.{decimals}f}"


if __name__ == "__main__":
    main()
