"""One stage against two, samplers, guidance, melody, and the cost of denoisers by length.

    ssmttm sweep sweep=two_stage_tiny store=STORE && ssmttm sweep sweep=denoisers_tiny store=STORE
    python -m benchmarks.two_stage compare STORE runs/sweeps/two_stage_tiny
    python -m benchmarks.two_stage samplers STORE runs/sweeps/denoisers_tiny
    python -m benchmarks.two_stage guidance STORE RUN [RUN ...]
    python -m benchmarks.two_stage melody STORE tiny_lm
    python -m benchmarks.two_stage length

Each writes benchmarks/results/two_stage_WHAT.json and prints its table in Markdown. STORE is a built-in one, and the
music is that of its test split; `guidance`, which selects settings, uses the validation split. Shapes: n prompts, K
codebooks, T frames.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.held_out import ATTRIBUTES, FRAMES, HeldOutMusic
from benchmarks.paired import environment, paired
from ssmttm import MusicPipeline, config
from ssmttm.audio.features import frame_chroma
from ssmttm.codecs.metrics import chroma_similarity
from ssmttm.diffusion.samplers import SAMPLERS, SamplerSettings
from ssmttm.generation.engine import generate
from ssmttm.generation.loading import load_denoiser, open_model_folder
from ssmttm.generation.request import Sampling
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models import build_model
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.reports.tables import markdown_table
from ssmttm.sweeps.report import interval
from ssmttm.text.condition import TextCondition

RESULTS = Path(__file__).parent / "results"
METRICS = ("mel", "fad", "kad", *ATTRIBUTES)
TITLES = ["mel distance", "FAD", "KAD", "family accuracy", "tempo class accuracy", "mode accuracy"]


def compare(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Every system of the sweep two_stage_tiny, seed by seed."""
    music, jobs = HeldOutMusic(arguments.store, arguments.prompts), Path(arguments.sweep) / "jobs"
    captions = [prompt.caption for prompt in music.prompts]
    text, null = music.text()

    def from_true_codes(seed: int, part: str) -> Tensor:
        second_stage = load_second_stage(jobs / f"{part}-seed{seed}" / "run", music)
        seeds = [1_000 * seed + i for i in range(len(captions))]
        return second_stage.generate(music.codes[:, :1], SecondStageInputs(text, null, seeds))

    def sampled(seed: int, first: str, second: str | None) -> Tensor:
        second_stage = None if second is None else jobs / f"{second}-seed{seed}" / "run"
        pipe = MusicPipeline.from_pretrained(jobs / f"{first}-seed{seed}" / "run", second_stage=second_stage)
        seeds = [1_000 * seed + i for i in range(len(captions))]
        parts = [pipe(captions[i : i + 16], FRAMES / music.codec.frame_rate, seeds=seeds[i : i + 16]).codes
                 for i in range(0, len(captions), 16)]  # fmt: skip
        return torch.cat(parts)

    systems: dict[str, Callable[[int], Tensor]] = {
        "true coarse codes + diffusion": lambda seed: from_true_codes(seed, "stage2"),
        "true coarse codes + regression": lambda seed: from_true_codes(seed, "regression"),
        "two stages: sampled coarse codes + diffusion": lambda seed: sampled(seed, "stage1", "stage2"),
        "sampled coarse codes + regression": lambda seed: sampled(seed, "stage1", "regression"),
        "single stage": lambda seed: sampled(seed, "single", None),
    }
    found = {
        "true music": [music.audio_metrics(music.true)],
        "codec reconstruction (all true codes)": [music.metrics(music.codes)],
        "true coarse codes only (first codebook)": [music.metrics(music.codes[:, :1])],
    }
    for name, make in systems.items():
        found[name] = [music.metrics(make(seed)) for seed in tqdm(arguments.seeds, desc=name, unit="seed")]
        if "sampled" in name or "single" in name:
            for metrics in found[name]:
                metrics.pop("mel")  # not the same music
    rows = [["", *TITLES]]
    for name, seeds in found.items():
        rows.append([name, *(interval(np.array([f[k] for f in seeds])) if k in seeds[0] else "" for k in METRICS)])
    return rows, {"prompts": len(captions), "systems": found}


def samplers(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Second stages on true coarse codes by network, objective, sampler and number of steps."""
    music, jobs = HeldOutMusic(arguments.store, arguments.prompts), Path(arguments.sweep) / "jobs"
    text, null = music.text()
    rows, found = [["network", "objective", "sampler", "steps", "evaluations", "seconds per 10 s clip", *TITLES]], []
    for job in sorted(jobs.iterdir()):
        network, objective = job.name.split("-")[0].split("_")
        second_stage = load_second_stage(job / "run", music)
        for sampler in SAMPLERS[objective] if network == "ssm" else SAMPLERS[objective][:1]:
            for steps in arguments.steps:
                settings = SamplerSettings(objective, sampler, steps)
                second_stage.settings = replace(second_stage.settings, sampler=settings)
                inputs = SecondStageInputs(text, null, list(range(len(music.prompts))))
                metrics = music.metrics(second_stage.generate(music.codes[:, :1], inputs))
                seconds = seconds_per_clip(second_stage, music.codes[:1, :1], inputs.select_rows(slice(1)))
                found.append({"network": network, "objective": objective, "sampler": sampler, "steps": steps,
                              "evaluations": settings.n_evaluations, "seconds": seconds, **metrics})  # fmt: skip
                cells = [network, objective, sampler, str(steps), str(settings.n_evaluations), f"{seconds:.2f}"]
                rows.append([*cells, *(f"{metrics[k]:.3f}" for k in METRICS)])
                print(" | ".join(rows[-1]), flush=True)
    return rows, {"prompts": len(music.prompts), "threads": torch.get_num_threads(), "rows": found}


def guidance(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Each run on true coarse codes of the validation split, by guidance scale (of text and coarse codes)."""
    music = HeldOutMusic(arguments.store, arguments.prompts, split="valid")
    text, null = music.text()
    rows, found = [["run", "scale", *TITLES]], []
    for run in arguments.runs:
        folder, second_stage = open_model_folder(run, task="diffusion"), load_second_stage(run, music)
        run_info = {"objective": folder.config.diffusion.objective, "step": int(folder.card["step"])}
        for scale in arguments.scales:
            second_stage.settings = replace(second_stage.settings, guidance_scale=scale, coarse_guidance_scale=scale)
            inputs = SecondStageInputs(text, null, list(range(len(music.prompts))))
            n_coarse = second_stage.model.config.n_coarse_codebooks
            codes = second_stage.generate(music.codes[:, :n_coarse], inputs)
            found.append({**run_info, "scale": scale, **music.metrics(codes)})
            cells = [f"{run_info['objective']}, {run_info['step']} steps", f"{scale:g}"]
            rows.append([*cells, *(f"{found[-1][k]:.3f}" for k in METRICS)])
            print(" | ".join(rows[-1]), flush=True)
    return rows, {"prompts": len(music.prompts), "rows": found}


def melody(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Captions with the melodies of other clips: chroma similarity to the melody, and agreement with the caption."""
    music = HeldOutMusic(arguments.store, arguments.prompts)
    pipe = MusicPipeline.from_pretrained(arguments.model)
    text, null = music.text()
    seeds, rate = list(range(len(music.prompts))), music.codec.sample_rate
    others = music.true.roll(1, 0)  # [n, S]; prompts alternate between families, so these have other families
    controls = Controls(chroma=frame_chroma(others, rate, FRAMES))

    def generated(controls: Controls) -> Tensor:
        """[n, K, T], with controls for the stages that support them."""
        first, second = (controls.supported_by(model.config) for model in (pipe.model, pipe.second_stage.model))
        coarse_codes = generate(pipe.model, text, null, pipe.pattern, FRAMES, Sampling(), seeds, controls=first)
        return pipe.second_stage.generate(coarse_codes, SecondStageInputs(text, null, seeds, second))

    def decoded(codes: Tensor) -> Tensor:
        return torch.cat([music.codec.decode(part)[:, 0] for part in codes.split(8)])[:, : others.shape[1]]

    systems = {
        "the melody's own music": lambda: others,
        "the same after codec reconstruction": lambda: decoded(music.codes.roll(1, 0)),
        "caption and melody": lambda: decoded(generated(controls)),
        "caption alone": lambda: decoded(generated(Controls())),
        "the caption's own music": lambda: music.true,
    }
    rows, found = [["", "chroma similarity", *TITLES[1:]]], {}
    for name, make in systems.items():
        wav = make()
        similarity = chroma_similarity(wav, others, rate).tolist()
        found[name] = {"chroma_similarity": similarity, **music.audio_metrics(wav)}
        rows.append([name, interval(np.array(similarity)), *(f"{found[name][k]:.3f}" for k in METRICS[1:])])
    return rows, {"prompts": len(music.prompts), "model": str(arguments.model), "systems": found}


def length(arguments: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Milliseconds of one evaluation of each untrained network, batch 1, by seconds of music at 25 Hz."""
    torch.manual_seed(0)
    text = TextCondition.stack([torch.randn(16, 384)])
    names = ("ssm", "dit", "unet")
    configs = {name: config.load("task=diffusion", f"model=tiny_denoiser_{name}").model for name in names}
    models = {name: build_model(model_config).eval() for name, model_config in configs.items()}
    sizes = models["ssm"].config  # latent channels, those of all three
    rows = [["seconds of music", *(f"{name}, ms" for name in models)]]
    found: dict[str, dict[str, list[float]]] = {}
    for seconds in arguments.seconds:
        frames = 25 * seconds
        noisy, coarse = (torch.randn(1, channels, frames) for channels in (sizes.noisy_channels, sizes.coarse_channels))
        inputs = noisy, torch.tensor([0.5]), Conditions(coarse, text)
        with torch.inference_mode():
            cases = {name: partial(model, *inputs) for name, model in models.items()}
            times = paired(cases, arguments.rounds, f"{seconds} s")
        found[str(seconds)] = {name: [1e3 * t for t in values] for name, values in times.items()}
        rows.append([str(seconds), *(f"{1e3 * np.median(values):.1f}" for values in times.values())])
    first, last = str(arguments.seconds[0]), str(arguments.seconds[-1])
    growth = np.log(arguments.seconds[-1] / arguments.seconds[0])
    exponents = {n: float(np.log(np.median(found[last][n]) / np.median(found[first][n])) / growth) for n in models}
    rows.append(["growth exponent", *(f"{exponent:.2f}" for exponent in exponents.values())])
    return rows, {"milliseconds": found, "exponents": exponents}


def seconds_per_clip(second_stage: SecondStage, coarse_codes: Tensor, inputs: SecondStageInputs) -> float:
    """Median time of three runs on coarse codes [1, 1, T], scaled to 10 s."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        second_stage.generate(coarse_codes, inputs)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 10 * second_stage.codec.frame_rate / coarse_codes.shape[-1]


def load_second_stage(run: Path, music: HeldOutMusic) -> SecondStage:
    """The second stage of a run, with the music's codec."""
    folder = open_model_folder(run, task="diffusion")
    return SecondStage(load_denoiser(folder), music.codec, SecondStageConfig.from_config(folder.config))


KINDS = {"compare": compare, "samplers": samplers, "guidance": guidance, "melody": melody, "length": length}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    kinds = parser.add_subparsers(dest="what", required=True)
    for name in ("compare", "samplers"):
        kind = kinds.add_parser(name)
        kind.add_argument("store")
        kind.add_argument("sweep")
        kind.add_argument("--prompts", type=int, default=96)
    kinds.choices["compare"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    kinds.choices["samplers"].add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 50, 100])
    kind = kinds.add_parser("guidance")
    kind.add_argument("store")
    kind.add_argument("runs", nargs="+", type=Path)
    kind.add_argument("--scales", type=float, nargs="+", default=[1, 2, 3, 4])
    kind.add_argument("--prompts", type=int, default=48)
    kind = kinds.add_parser("melody")
    kind.add_argument("store")
    kind.add_argument("model")
    kind.add_argument("--prompts", type=int, default=96)
    kind = kinds.add_parser("length")
    kind.add_argument("--seconds", type=int, nargs="+", default=[10, 30, 60, 120, 240])
    kind.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows, results = KINDS[arguments.what](arguments)
    print(markdown_table(rows))
    path = RESULTS / f"two_stage_{arguments.what}.json"
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
