"""The side of `tiny_stereo`: fit its codebooks, and measure it beside mono and codecs of two waveforms.

python -m benchmarks.stereo_codec fit FOLDER     # the shipped codebooks, from built-in pieces and drawn parameters
python -m benchmarks.stereo_codec measure        # held-out pieces and planted channels
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paired import environment
from data_prep.builtin import compose
from data_prep.builtin.synth import render_stereo
from data_prep.stages.cut import Cut, cut_shard
from data_prep.stages.plan import planned_shards, write_plan
from data_prep.track import Track
from ssmttm import MusicPipeline, audio
from ssmttm.codecs import Codec, load_codec
from ssmttm.codecs.metrics import StereoErrors, stereo_errors
from ssmttm.codecs.stereo.parametric import ParametricStereoCodec, ParametricStereoConfig, StereoParameters
from ssmttm.models.token_lm import TokenLM
from ssmttm.patterns import get_pattern

RATE, SECONDS = 24_000, 10
FIT_SEED, HELD_OUT_SEED = 4100, 999
PLANTED = {"left": (1.0, 0.0), "right": (0.0, 1.0), "anti-phase": (1.0, -1.0), "equal": (1.0, 1.0)}


def pieces(seed: int, count: int) -> Iterator[Tensor]:
    """Stereo pieces, [1, 2, S] each."""
    for index in tqdm(range(count), desc=f"pieces of seed {seed}", leave=False):
        yield torch.from_numpy(render_stereo(compose(seed, index), RATE))[None]


def drawn_parameters(n: int, n_bands: int, generator: torch.Generator) -> StereoParameters:
    """Parameters of music that the pieces do not have, [n, N] each: all angles and relations, the same in all bands, or
    wandering from band to band."""

    def wander(low: float, high: float) -> Tensor:
        steps = 0.15 * torch.randn(n, n_bands, generator=generator) * (torch.rand(n, 1, generator=generator) < 0.5)
        start = torch.rand(n, 1, generator=generator)
        return low + (high - low) * (start + steps.cumsum(1)).clamp(0, 1)

    relation = wander(-1, 1)
    panned = torch.rand(n, 1, generator=generator) < 0.5
    return StereoParameters(wander(0, math.pi / 2), torch.where(panned, relation.sign(), relation))


def fit(folder: Path, n_pieces: int, n_codebooks: int) -> None:
    """Fit the codebooks and write the codec."""
    torch.manual_seed(0)
    mono = load_codec("tiny")
    codec = ParametricStereoCodec(ParametricStereoConfig("tiny", mono.fingerprint, n_codebooks), mono, folder.name)
    vectors = []
    for wav in pieces(FIT_SEED, n_pieces):
        left, right = wav.unbind(1)
        found = codec.measure(codec.stft((left + right) / 2), codec.stft((left - right) / 2))
        for sign in (1, -1):  # and mirrored
            vectors.append(StereoParameters(found.angle, sign * found.relation).vectors()[0])
    music = torch.cat(vectors)  # [n, 2 N]
    drawn = drawn_parameters(len(music) // 2, codec.config.n_bands, torch.Generator().manual_seed(1))
    codec.side.fit(torch.cat([music, drawn.vectors()]))
    codec.save(folder)


def decoders(stereo: Codec) -> dict[str, tuple[float, Callable[[Tensor], Tensor]]]:
    """Ways to code stereo: kbit/s, and the decoded audio [B, 2, S] of audio."""
    mono = load_codec("tiny")

    def coded(wav: Tensor, n: int) -> Tensor:
        return mono._decode(mono._encode(wav)[:, :n])

    def mid_side(wav: Tensor, n: int) -> Tensor:
        mid, side = coded(wav.mean(1, keepdim=True), 12), coded((wav[:, :1] - wav[:, 1:]) / 2, n)
        return torch.cat([mid + side, mid - side], dim=1)

    def left_right(wav: Tensor, n: int) -> Tensor:
        return torch.cat([coded(wav[:, :1], n), coded(wav[:, 1:], n)], dim=1)

    def parametric(wav: Tensor, n: int) -> Tensor:
        return stereo._decode(stereo._encode(wav)[:, :n])

    rate = mono.frame_rate * math.log2(mono.codebook_size) / 1000  # kbit/s a codebook
    found = {
        "mono, 12 codebooks": (12 * rate, lambda wav: coded(wav.mean(1, keepdim=True), 12).expand(-1, 2, -1)),
        "mid 12, side 6 of the same codec": (18 * rate, lambda wav: mid_side(wav, 6)),
        "left 9, right 9": (18 * rate, lambda wav: left_right(wav, 9)),
    }
    for n in range(14, stereo.n_codebooks + 1, 2):
        name = f"mid 12, side parametric {n - 12}"
        found[name] = (n * rate, lambda wav, n=n: parametric(wav, n))
    return found


def planted_levels(decode: Callable[[Tensor], Tensor], wav: Tensor) -> dict[str, list[float]]:
    """Level of each channel over its original in dB, or over the other channel where it was silent."""
    levels = {}
    signal = wav.mean(1, keepdim=True)
    for name, gains in PLANTED.items():
        original = signal * torch.tensor(gains)[:, None]
        energy = decode(original)[..., : wav.shape[-1]].square().mean(-1)[0]
        reference = original.square().mean(-1)[0]
        levels[name] = (10 * (energy / reference.clamp_min(reference.max())).log10()).tolist()
    return levels


@torch.no_grad()
def measure(stereo: Codec, n_clips: int) -> dict[str, dict[str, object]]:
    """Errors of all ways to code stereo on held-out pieces."""
    length = SECONDS * RATE
    clips = [wav[..., wav.shape[-1] // 2 :][..., :length] for wav in pieces(HELD_OUT_SEED, n_clips)]
    results: dict[str, dict[str, object]] = {}
    for name, (rate, decode) in decoders(stereo).items():
        errors = [stereo_errors(decode(wav)[..., :length], wav, RATE) for wav in clips]
        means = [sum(values) / len(errors) for values in zip(*errors, strict=True)]
        results[name] = {"kbps": rate, **StereoErrors(*means)._asdict(), "planted": planted_levels(decode, clips[0])}
    return results


def speed(rounds: int) -> dict[str, float]:
    """Medians of the CPU time of stereo over mono, in turn: the stage `cut` of 48 kHz stereo FLAC, and 10 s of sampling
    with a model of the embedded one's size and random weights (`tiny` and `tiny_stereo`)."""
    ratios: dict[str, list[float]] = {"cut": [], "sampling": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "music").mkdir()
        for index, wav in enumerate(pieces(HELD_OUT_SEED, 2)):
            audio.write(root / f"music/{index}.flac", audio.resample(wav[0], RATE, 48_000), 48_000)
        tracks = [Track(f"{index}", f"{index}.flac") for index in range(2)]
        (root / "plan").mkdir()
        write_plan(tracks, root / "music", "CC0-1.0", "open", root / "plan")
        shards = range(len(planned_shards(root / "plan")))
        pipes = [_random_pipeline(name) for name in ("tiny", "tiny_stereo")]
        for number in range(rounds):
            taken: dict[str, list[float]] = {"cut": [], "sampling": []}
            for channels, pipe in zip((1, 2), pipes, strict=True):
                cut = Cut(48_000, segment=20.0, channels=channels)
                folders = [root / f"cut-{number}-{channels}-{index}" for index in shards]
                taken["cut"].append(_cpu_seconds(partial(_cut, root, cut, folders)))
                taken["sampling"].append(_cpu_seconds(partial(pipe, "a waltz", duration=10.0)))
            for name, (mono, stereo) in taken.items():
                ratios[name].append(stereo / mono)
    return {name: statistics.median(values) for name, values in ratios.items()}


def _cut(root: Path, cut: Cut, folders: list[Path]) -> None:
    for index, folder in enumerate(folders):
        folder.mkdir()
        cut_shard(root / "music", root / "plan", index, cut, folder)


def _cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process and its ended children."""
    begun = sum(os.times()[:4])
    run()
    return sum(os.times()[:4]) - begun


def _random_pipeline(codec_name: str) -> MusicPipeline:
    """The embedded model's architecture, with random weights for the codebooks of a codec."""
    embedded, codec = MusicPipeline.from_pretrained(), load_codec(codec_name)
    torch.manual_seed(0)
    model = TokenLM(dataclasses.replace(embedded.model.config, n_codebooks=codec.n_codebooks))
    return MusicPipeline(model, codec, embedded.text_encoder, get_pattern("delay", codec.n_codebooks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit")
    fitting.add_argument("folder", type=Path)
    fitting.add_argument("--pieces", type=int, default=16)
    fitting.add_argument("--codebooks", type=int, default=4)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--codec", default="tiny_stereo")
    measuring.add_argument("--clips", type=int, default=8)
    measuring.add_argument("--out", type=Path, default=Path("benchmarks/results/stereo_codec.json"))
    timing = commands.add_parser("speed")
    timing.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "speed":
        print(speed(arguments.rounds))
        return
    if arguments.command == "fit":
        fit(arguments.folder, arguments.pieces, arguments.codebooks)
        return
    results = measure(load_codec(arguments.codec), arguments.clips)
    arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    for name, row in results.items():
        print(name, {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
