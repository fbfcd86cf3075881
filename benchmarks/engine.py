"""The engines of the decoding step, on one CPU thread: embedded models, a large one, transformers' models, quality.

    python -m benchmarks.engine --old TREE --store STORE

TREE is a checkout of an older commit: its step and pipeline take turns with ours, in a process of their own. STORE is a
built-in store that no embedded model was trained on (`python -m data_prep builtin --seed 71 ...`). All cases of a table
take turns. Times are medians, 10th percentiles, and medians of the process's CPU time, which depend less on what else
runs. The share of the limit is the time of reading what a step must (its weights once, its state twice) in 4 streams,
over the step's. Writes benchmarks/results/engine.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

RESULTS = Path(__file__).parent / "results" / "engine.json"
PROMPT = "a slow waltz in D minor on a music box"
CLIP_SECONDS = 10.0
LARGE = {"n_codebooks": 4, "codebook_size": 2048, "d_model": 1024, "n_layers": 24, "d_state": 128, "block": "mamba"}
POSITION = 750  # the middle of a clip of 30 s, as the step of a Transformer is linear in it
Case = Callable[[], object]
Seconds = tuple[float, float]  # of the clock, and of the process
Times = dict[str, list[Seconds]]

# Runs in a process with an older tree on its path; answers each line with seconds.
OLD = """
import sys, tempfile, time
import torch
from ssmttm import MusicPipeline, audio
torch.set_num_threads(1)
pipes, steps = {}, {}
for name, rows in (("tiny_lm", 2), ("tinyttm_tiny", 1)):
    pipe = pipes[name] = MusicPipeline.from_pretrained(name, "cpu")
    state = pipe.model.init_state(4)  # generation padded the rows to 4
    steps[name] = (pipe.model, torch.zeros(4, 8, dtype=torch.long), state)
folder = tempfile.mkdtemp()
print("ready", flush=True)
for line in sys.stdin:
    kind, name, prompt, seconds = line.rstrip("\\n").split("\\t")
    begun = time.perf_counter(), time.process_time()
    if kind == "step":
        model, codes, state = steps[name]
        with torch.inference_mode():
            model.step(codes, state)
    else:
        output = pipes[name](prompt, float(seconds))
        audio.write(folder + "/clip.wav", output.audios[0], output.sample_rate)
    print(time.perf_counter() - begun[0], time.process_time() - begun[1], flush=True)
"""


class OldTree:
    """An older commit in a process of its own."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OLD], cwd=tree, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self._read("ready")

    def time(self, kind: str, name: str) -> Seconds:
        """Of a step or of a clip."""
        self.process.stdin.write(f"{kind}\t{name}\t{PROMPT}\t{CLIP_SECONDS}\n")
        self.process.stdin.flush()
        wall, cpu = self._read().split()
        return float(wall), float(cpu)

    def _read(self, expected: str | None = None) -> str:
        line = self.process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            raise RuntimeError(f"the older tree answered {line!r}")
        return line


def in_turn(cases: dict[str, Callable[[], Seconds]], rounds: int, repeats: int) -> Times:
    """Seconds of each case; each returns its own. The first round, and the first repeat of a turn, are warm-up."""
    times: Times = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            for repeat in range(repeats + 1):
                seconds = case()
                if number and repeat:
                    times[name].append(seconds)
    return times


def timed(case: Case) -> Callable[[], Seconds]:
    def run() -> Seconds:
        begun = time.perf_counter(), time.process_time()
        case()
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    return run


def step_cases(model: Any, rows: int, formats: dict[str, tuple[str, ...]]) -> tuple[dict[str, Case], dict[str, int]]:
    """A step of every engine and format, and the bytes that it must move."""
    from ssmttm.generation import engines
    from ssmttm.models.controls import Controls

    state, codes = model.init_state(rows), torch.zeros(1, model.config.n_codebooks, dtype=torch.long)
    inner = [part.inner for block in state.blocks for part in block if part.inner is not None]
    carried = 2 * sum(value.nbytes for part in inner for value in vars(part).values())
    cases: dict[str, Case] = {}
    sizes: dict[str, int] = {}
    for name, all_weights in formats.items():
        for weights in all_weights:
            engine = engines.build(model, name, weights)
            padded = model.init_state(engine.n_rows(rows))
            steps = engine.bind(padded if name == "torch" else state.clone(), 1)
            cases[f"{name} {weights}"] = lambda steps=steps: steps.step(codes, Controls(), 0)
            if name != "torch":
                sizes[f"{name} {weights}"] = engine.n_bytes + carried
    return cases, sizes


def reading_cases(sizes: dict[str, int]) -> dict[str, Case]:
    """Reading as many bytes as each engine's step."""
    from ssmttm.generation.engines.library import library

    buffer = np.ones(max(sizes.values()) // 4, np.float32)
    at = buffer.ctypes.data
    return {f"read {name}": lambda n=size // 4: (buffer, library().ssmttm_read(at, n)) for name, size in sizes.items()}


def summary(times: Times, base: str | None, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Milliseconds. speed: time of `base` over that of the case; share: of the limit by reading. Each by medians, by
    10th percentiles and by CPU time."""
    measures = {"median": lambda t: np.median(t, 0)[0], "p10": lambda t: np.percentile(t, 10, 0)[0],
                "cpu": lambda t: np.median(t, 0)[1]}  # fmt: skip
    table: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        row = table[name] = {}
        for key, measure in measures.items():
            row[f"{key}_ms"] = 1e3 * float(measure(values))
            if base is not None:
                row[f"speed_{key}"] = float(measure(times[base]) / measure(values))
            if name in sizes:
                row[f"share_{key}"] = float(measure(times[f"read {name}"]) / measure(values))
        if name in sizes:
            row["MB"] = sizes[name] / 1e6
    return table


def embedded_steps(old: OldTree | None, name: str, rows: int, rounds: int) -> dict[str, Any]:
    """A step of an embedded model."""
    from ssmttm import MusicPipeline

    model = MusicPipeline.from_pretrained(name, "cpu").model
    quantised = name == "tinyttm_tiny"
    formats = {"torch": ("fp32",), "fused": ("int8",) if quantised else ("fp32", "bf16", "int8")}
    formats["ort"] = ("int8",) if quantised else ("fp32", "int8")
    cases, sizes = step_cases(model, rows, formats)
    timers = {case: timed(run) for case, run in (cases | reading_cases(sizes)).items()}
    if old is not None:
        timers = {"147b79f": lambda: old.time("step", name), **timers}
    return summary(in_turn(timers, rounds, 8), "147b79f" if old else None, sizes)


def guidance_cost(rounds: int) -> dict[str, Any]:
    """A step of the embedded model with the null row and without."""
    from ssmttm import MusicPipeline

    model = MusicPipeline.from_pretrained("tiny_lm", "cpu").model
    timers = {}
    for rows in (1, 2):
        cases, _ = step_cases(model, rows, {"fused": ("fp32", "int8")})
        timers |= {f"{name}, {rows} rows": timed(run) for name, run in cases.items()}
    return summary(in_turn(timers, rounds, 8), None, {})


def clips(old: OldTree | None, name: str, rounds: int) -> dict[str, Any]:
    """From the prompt to a WAV file of CLIP_SECONDS."""
    from ssmttm import MusicPipeline, audio

    pipe = MusicPipeline.from_pretrained(name, "cpu")
    folder = Path(tempfile.mkdtemp())

    def clip(engine: str, weights: str) -> None:
        output = pipe(PROMPT, CLIP_SECONDS, engine=engine, weights=weights)
        audio.write(folder / "clip.wav", output.audios[0], output.sample_rate)

    settings = [("torch", "fp32"), ("fused", "fp32"), ("fused", "int8"), ("ort", "int8")]
    if name == "tinyttm_tiny":
        settings = [("torch", "fp32"), ("fused", "int8"), ("ort", "int8")]
    timers = {" ".join(both): timed(lambda both=both: clip(*both)) for both in settings}
    if old is not None:
        timers = {"147b79f": lambda: old.time("clip", name), **timers}
    return summary(in_turn(timers, rounds, 1), "147b79f" if old else None, {})


def large_steps(rounds: int) -> dict[str, Any]:
    """A step of 2 rows of 48 Mamba-2 mixers of d 1,024 beside transformers' Mamba2 and MusicGen-small's shape."""
    from benchmarks.decode import transformers_mamba2, transformers_musicgen
    from ssmttm.models import TokenLM, TokenLMConfig

    model = TokenLM(TokenLMConfig(**LARGE)).eval()
    cases, sizes = step_cases(model, 2, {"fused": ("fp32", "bf16", "int8"), "ort": ("int8",)})
    cases |= reading_cases(sizes)
    cases["transformers Mamba2"] = transformers_mamba2(1024, 48, 64)
    musicgen = f"transformers MusicGen, position {POSITION}"
    cases[musicgen] = transformers_musicgen(1024, 24, POSITION)
    return summary(in_turn({name: timed(case) for name, case in cases.items()}, rounds, 2), musicgen, sizes)


@torch.inference_mode()
def cross_entropy(store: str, n_segments: int, n_frames: int) -> dict[str, Any]:
    """Nats a code of held-out music under the embedded model: the same codes, step by step, in every format."""
    from ssmttm import MusicPipeline
    from ssmttm.data import open_store
    from ssmttm.models.controls import Controls
    from ssmttm.text.condition import TextCondition

    pipe, data = MusicPipeline.from_pretrained("tiny_lm", "cpu"), open_store(store)
    model, special = pipe.model, pipe.model.special_token_id
    rows = [row for row in range(len(data)) if data.codes(row).shape[1] >= n_frames][:n_segments]
    kinds = [("fused", "fp32"), ("fused", "bf16"), ("fused", "int8"), ("ort", "int8")]
    losses: dict[str, list[float]] = {" ".join(kind): [] for kind in kinds}
    for row in rows:
        codes = torch.from_numpy(data.codes(row)[: model.config.n_codebooks, :n_frames].astype(np.int64))[None]
        sequence = pipe.pattern.build(codes, special)[..., :n_frames]
        text = torch.from_numpy(np.array(data.text(data.captions(row)[0]), np.float32))
        state = model.init_state(1)
        start = torch.full((1, codes.shape[1], 1), special)
        first = model.prefill(start, TextCondition.stack([text]), state)
        target = sequence[0].T.where(special > sequence[0].T, -100)  # [S, K]
        for kind in kinds:
            steps = pipe.engine(*kind).bind(state.clone(), 1)
            found = [steps.step(sequence[..., s], Controls(), s) for s in range(n_frames - 1)]
            logits = torch.cat([first, *found]).flatten(0, 1)
            losses[" ".join(kind)].append(float(F.cross_entropy(logits, target.flatten(), ignore_index=-100)))
    base = np.mean(losses["fused fp32"])
    return {
        name: {"nats": float(np.mean(values)), "change": float(np.mean(values) - base)}
        for name, values in losses.items()
    } | {"segments": len(rows), "frames": n_frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="TREE", help="a checkout of an older commit")
    parser.add_argument("--store", metavar="STORE", help="held-out music")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large-rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["steps", "guidance", "clips", "large", "quality"])
    arguments = parser.parse_args()
    from benchmarks.paired import environment

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    old = None if arguments.old is None else OldTree(arguments.old)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    parts: dict[str, Callable[[], Any]] = {}
    if "steps" in arguments.only:
        parts["step, tiny_lm, 2 rows"] = lambda: embedded_steps(old, "tiny_lm", 2, arguments.rounds)
        parts["step, tinyttm_tiny, 1 row"] = lambda: embedded_steps(old, "tinyttm_tiny", 1, arguments.rounds)
    if "guidance" in arguments.only:
        parts["step, tiny_lm, 1 and 2 rows"] = lambda: guidance_cost(arguments.rounds)
    if "clips" in arguments.only:
        for name in ("tiny_lm", "tinyttm_tiny"):
            parts[f"clip of {CLIP_SECONDS:g} s, {name}"] = lambda name=name: clips(old, name, arguments.rounds // 3)
    if "large" in arguments.only:
        parts["step, 48 Mamba-2 mixers, d 1024, 2 rows"] = lambda: large_steps(arguments.large_rounds)
    if "quality" in arguments.only and arguments.store:
        parts["held-out cross-entropy, tiny_lm"] = lambda: cross_entropy(arguments.store, 8, 200)
    for title, part in parts.items():
        load = os.getloadavg()[0]
        table = part()
        results[title] = {"load": [round(load, 2), round(os.getloadavg()[0], 2)], "cases": table}
        results["environment"] = environment()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{title}, load {load:.1f} to {os.getloadavg()[0]:.1f}")
        for name, row in table.items():
            cells = row if isinstance(row, dict) else {"": row}
            print(f"  {name:44}" + "  ".join(f"{key} {value:.4g}" for key, value in cells.items()), flush=True)


if __name__ == "__main__":
    main()
