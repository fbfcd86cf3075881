"""Does the music follow the prompt? Held-out captions in, generated audio heard by the detectors, agreement out.

For lead family, tempo class and mode: how often the detectors hear what the prompt asked for, what chance would give,
the same with prompts and music shuffled against one another, and how often the detectors are right on true music.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ssmttm.data.store import Store, open_store
from ssmttm.evaluation.accuracy import ATTRIBUTES, accuracy, window_of
from ssmttm.evaluation.audio_checks import AudioCheck, check_audio, spectral_flatness
from ssmttm.evaluation.detectors import MODES, TEMPO_CLASSES, Detection, Detectors, third
from ssmttm.evaluation.features import SAMPLE_RATE
from ssmttm.evaluation.prompts import Prompt, balanced_prompts
from ssmttm.evaluation.statistics import Agreement, agreement_of
from ssmttm.files import write_text
from ssmttm.generation.pipeline import MusicPipeline

BATCH = 10
_NAMES = {"family": "lead family", "tempo_class": "tempo class", "mode": "mode", "third": "major or minor third"}
_TITLES = ("attribute", "agreement", "95 % interval", "chance (uniform / majority)", "p", "shuffled", "p (shuffled)")


@dataclass(frozen=True)
class AdherenceReport:
    """The figures of one evaluation.

    Attributes:
        agreement: by attribute (family, tempo_class, mode, third).
        detector_accuracy: `accuracy` of the detectors on the same store's held-out audio, `true` and `reconstructed`.
        checks: how many of the generated pieces were silent, clipped, noisy or not finite.
        fingerprint: what the figures depend on: model, codec, detectors, store, seed, n, duration, guidance scale.
        pieces: each prompt with its seed, what was expected and what was heard.
    """

    agreement: dict[str, Agreement]
    detector_accuracy: dict[str, dict[str, Any]]
    checks: dict[str, int]
    fingerprint: dict[str, Any]
    pieces: list[dict[str, Any]]

    def table(self) -> str:
        """The figures as Markdown."""
        hearings = list(self.detector_accuracy)
        titles = [*_TITLES, *(f"detector right on {name} audio" for name in hearings)]
        lines = [titles, ["---"] * len(titles)]
        for name, a in self.agreement.items():
            rights = [f"{100 * self.detector_accuracy[hearing][name]:.1f} %" for hearing in hearings]
            cells = [f"{100 * a.share:.1f} %", f"{100 * a.low:.0f} to {100 * a.high:.0f} %"]
            cells += [f"{100 * a.uniform:.1f} / {100 * a.majority:.1f} %", f"{a.p_value:.2g}"]
            lines.append([_NAMES[name], *cells, f"{100 * a.shuffled:.1f} %", f"{a.shuffled_p:.2g}", *rights])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        counts = ", ".join(f"{name} {table_['n']} windows" for name, table_ in self.detector_accuracy.items())
        checks = ", ".join(f"{count} {name}" for name, count in self.checks.items())
        facts = ", ".join(f"{name} {value}" for name, value in self.fingerprint.items())
        return f"{table}\n\nGenerated pieces: {checks}. Detectors heard: {counts}.\nMeasured with: {facts}."

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def evaluate_adherence(
    store_path: str | Path,
    checkpoint: str | Path | None = None,
    n_prompts: int = 100,
    duration: float = 10.0,
    guidance_scale: float = 3.0,
    seed: int = 0,
    detectors: Detectors | None = None,
    pipeline: MusicPipeline | None = None,
) -> AdherenceReport:
    """Measure how well a model follows held-out prompts of a built-in store.

    Args:
        store_path: a built-in store that keeps its audio; prompts come from its test split, and the detectors' accuracy
            is taken on its valid and test splits, on true audio and through the model's codec.
        checkpoint: a run, checkpoint or exported model; None: the embedded one.
        n_prompts: how many; each has a seed of its own, following from `seed`.
        duration: seconds of each piece, 4 or more.
        guidance_scale: of the sampling.
        seed: of the choice of prompts, of the sampling and of the shuffled control.
        detectors, pipeline: given instead of the embedded detectors and of the checkpoint's pipeline.

    Raises:
        UserError: the store has no ground truth, audio or enough prompts, or there is no such model.
    """
    store = open_store(store_path)
    prompts = balanced_prompts(store, n_prompts, seed)
    detectors = detectors or Detectors.from_pretrained()
    if pipeline is None:
        pipeline = MusicPipeline.from_pretrained(checkpoint)
    held_out = np.concatenate([store.indices("valid"), store.indices("test")])
    detector_accuracy = accuracy(detectors, store, held_out, pipeline.codec)
    reference = music_flatness(store, held_out)
    seeds = [seed * 1_000_003 % 2**31 + i for i in range(n_prompts)]
    detections: list[Detection] = []
    checks: list[AudioCheck] = []
    for start in tqdm(range(0, n_prompts, BATCH), desc=f"{n_prompts} prompts", unit="batch"):
        lot = slice(start, start + BATCH)
        out = pipeline([p.caption for p in prompts[lot]], duration, guidance_scale, seeds[lot])
        wavs = out.audios.float().mean(1)  # [n, S]
        checks += [check_audio(wav, out.sample_rate, reference) for wav in wavs]
        detections += detectors.detect(torch.nan_to_num(wavs), out.sample_rate)
    return AdherenceReport(
        agreement=_agreements(prompts, detections, len(detectors.families), seed),
        detector_accuracy=detector_accuracy,
        checks={name: sum(getattr(check, name) for check in checks) for name in ("good", "silent", "clipped", "noisy")},
        fingerprint={
            "model": pipeline.facts["model"]["name"],
            "weights": pipeline.facts["model"]["weights_sha256"][:16],
            "codec": pipeline.codec.fingerprint,
            "detectors": detectors.fingerprint,
            "store": store.fingerprint,
            "n": n_prompts,
            "duration": duration,
            "guidance": guidance_scale,
            "seed": seed,
        },
        pieces=[
            {
                "caption": prompt.caption,
                "id": store.ids(np.array([prompt.row]))[0],
                "seed": piece_seed,
                "expected": prompt.expected,
                "heard": {name: getattr(detection, name) for name in (*ATTRIBUTES, "bpm", "key")},
            }
            for prompt, piece_seed, detection in zip(prompts, seeds, detections, strict=True)
        ],
    )


def music_flatness(store: Store, rows: np.ndarray, most: int = 50) -> float:
    """The spectral flatness that 95 % of windows of up to `most` rows stay under: what `check_audio` compares with."""
    return float(np.quantile([spectral_flatness(window_of(store, int(row)), SAMPLE_RATE) for row in rows[:most]], 0.95))


def _agreements(prompts: list[Prompt], detections: list[Detection], n_families: int, seed: int) -> dict[str, Agreement]:
    """Agreement by attribute; the third is derived from the mode."""
    sizes = {"family": n_families, "tempo_class": len(TEMPO_CLASSES), "mode": len(MODES)}
    found = {
        name: agreement_of([p.expected[name] for p in prompts], [getattr(d, name) for d in detections], size, seed)
        for name, size in sizes.items()
    }
    thirds = [third(p.expected["mode"]) for p in prompts]
    return {**found, "third": agreement_of(thirds, [d.third for d in detections], 2, seed)}
