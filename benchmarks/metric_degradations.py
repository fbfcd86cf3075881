"""Which metric sees which degradation: python -m benchmarks.metric_degradations

Built-in music is degraded in known ways and compared with other clips of the same pieces. Writes
benchmarks/results/metric_degradations.json and prints a table for each embedder; docs/evaluation.md has the first.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.builtin import compose, render
from ssmttm import audio
from ssmttm.codecs import load_codec
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.metrics.frechet import frechet_distance
from ssmttm.evaluation.metrics.kernel import kernel_distance
from ssmttm.evaluation.metrics.mauve import mauve_divergence
from ssmttm.evaluation.metrics.prdc import precision_recall_coverage

OUT = Path(__file__).parent / "results" / "metric_degradations.json"
RATE, SECONDS, SEED = 24_000, 10, 6_100
STARTS = (2, 12, 22)  # seconds; one clip of a piece is degraded, the others are references
EMBEDDERS = ("tiny", "log_mel", "codec")
DISTANCES = {"fad": frechet_distance, "kad": kernel_distance, "mad": mauve_divergence}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=96, help="pieces of three clips each (default: %(default)s)")
    pieces = parser.parse_args().pieces
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of few clips: all distances are of equally many
    clean, references = clips(pieces)
    sets = {"clean": clean, **{name: [degrade(wav) for wav in clean] for name, degrade in degradations().items()}}
    sets["one clip in eight, repeated"] = [clean[i - i % 8] for i in range(len(clean))]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in EMBEDDERS:
        embedder = load_embedder(name)
        embed = lambda wavs, e=embedder: torch.cat([e.embed(wav)[0] for wav in wavs]).double()  # noqa: E731
        reference = embed(tqdm(references, desc=f"references ({name})", unit="clip"))
        results[name] = {kind: metrics(embed(wavs), reference) for kind, wavs in sets.items()}
    OUT.write_text(json.dumps({"pieces": pieces, "seed": SEED, "embedders": results}, indent=1) + "\n")
    for name, found in results.items():
        print("\n".join(table(name, found)))


def clips(pieces: int) -> tuple[list[Tensor], list[Tensor]]:
    """A clip [1, S] of each piece, and two others of each as references."""
    clean, references = [], []
    for index in tqdm(range(pieces), desc="composing", unit="piece"):
        wav = torch.from_numpy(render(compose(SEED, index)))[None]
        parts = [wav[:, start * RATE : (start + SECONDS) * RATE].clone() for start in STARTS]
        clean.append(parts.pop(index % len(parts)))  # as often from the beginning of a piece as the references are
        references += parts
    return clean, references


def degradations() -> dict[str, Callable[[Tensor], Tensor]]:
    codecs = {n: load_codec("tiny", n) for n in (2, 8)}

    @torch.inference_mode()
    def coded(wav: Tensor, n_codebooks: int) -> Tensor:
        codec = codecs[n_codebooks]
        return codec.decode(codec.encode(wav[None]))[0, :, : wav.shape[-1]]

    return {
        "white noise, 20 dB below": lambda wav: with_noise(wav, 20),
        "white noise, 10 dB below": lambda wav: with_noise(wav, 10),
        "low-pass at 4 kHz": lambda wav: low_passed(wav, 8_000),
        "low-pass at 2 kHz": lambda wav: low_passed(wav, 4_000),
        "clipped at 12 dB above full scale": lambda wav: (4 * wav / wav.abs().max()).clamp(-1, 1) * wav.abs().max(),
        "quarter seconds shuffled": shuffled,
        "played backwards": lambda wav: wav.flip(-1),
        "a quarter tone lower on top": lambda wav: wav + 0.7 * slower(wav, 2 ** (1 / 24)),
        "20 % slower, lower": lambda wav: slower(wav, 1.2),
        "codec, 8 codebooks": lambda wav: coded(wav, 8),
        "codec, 2 codebooks": lambda wav: coded(wav, 2),
        "silence": torch.zeros_like,
    }


def with_noise(wav: Tensor, decibel: float) -> Tensor:
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.square().mean().sqrt() * 10 ** (-decibel / 20)


def low_passed(wav: Tensor, rate: int) -> Tensor:
    return audio.resample(audio.resample(wav, RATE, rate), rate, RATE)[:, : wav.shape[-1]]


def slower(wav: Tensor, ratio: float) -> Tensor:
    """Played at a lower speed, cut to the same length."""
    return audio.resample(wav, RATE, round(RATE * ratio))[:, : wav.shape[-1]]


def shuffled(wav: Tensor) -> Tensor:
    segments = wav[0].unfold(0, RATE // 4, RATE // 4)
    return segments[torch.randperm(len(segments), generator=torch.Generator().manual_seed(0))].reshape(1, -1)


def metrics(x: Tensor, reference: Tensor) -> dict[str, float]:
    found = {name: distance(x, reference) for name, distance in DISTANCES.items()}
    return found | {name: float(value) for name, value in precision_recall_coverage(x, reference)._asdict().items()}


def table(embedder: str, found: dict[str, dict[str, float]]) -> list[str]:
    """The metrics of one embedder in Markdown."""
    names = list(found["clean"])
    rows = [f"| {kind} | {' | '.join(f'{value:.3g}' for value in values.values())} |" for kind, values in found.items()]
    return ["", f"| {embedder} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows]


if __name__ == "__main__":
    main()
