"""From prompt to WAV file by stage: text encoding, language model, codec decoding, writing.

    python -m benchmarks.end_to_end [SYSTEM ...]

SYSTEM is a model folder, an embedded model, or a recipe for students of MusicGen-small (tinyttm_89m, tinyttm_ssm_89m),
with random weights: speed does not depend on them. A real-time factor below 1 is faster than real time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from benchmarks.paired import environment
from ssmttm import MusicPipeline, audio, config
from ssmttm.codecs import StudentCodec
from ssmttm.codecs.hf import from_config
from ssmttm.compress.sizes import components, total
from ssmttm.generation.engine import generate
from ssmttm.generation.request import Sampling
from ssmttm.models import build_model
from ssmttm.ops.int8 import quantise
from ssmttm.patterns import get_pattern
from ssmttm.reports.tables import markdown_table
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.student import StudentEncoder

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
PROMPT, SECONDS = "a slow waltz in D minor on a music box, with a warm pad behind it", 10.0
STAGES = ("text", "language model", "decoding", "writing")
T5_SMALL = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64, "vocab_size": 32128}
# EnCodec at 32 kHz as MusicGen has it (arXiv 2306.05284).
ENCODEC = {
    "sampling_rate": 32000, "audio_channels": 1, "normalize": False, "chunk_length_s": None, "num_filters": 64,
    "hidden_size": 128, "codebook_dim": 128, "codebook_size": 2048, "upsampling_ratios": [8, 5, 4, 4],
    "target_bandwidths": [2.2], "use_causal_conv": False, "norm_type": "weight_norm", "num_residual_layers": 1,
    "use_conv_shortcut": False,
}  # fmt: skip


def random_system(recipe: str) -> MusicPipeline:
    """The student system of a recipe for MusicGen-small with random weights, and with MiniLM's tokenizer, since T5's is
    not part of this package."""
    parts = config.load(f"recipe={recipe}", root="compress").recipe
    lm, codec = config.load(*parts.lm), config.load(*parts.codec)
    torch.manual_seed(0)
    encoder = StudentEncoder(T5EncoderModel(T5Config(**T5_SMALL)), lm.model.text_dim).eval()
    text = TextEncoder("t5-small", encoder, load_text_encoder().tokenizer, "0" * 16, 128)
    fields = {name: codec.codec_student[name] for name in ("kind", "width", "blocks")}
    decoder = StudentCodec.from_teacher(from_config("encodec", dict(ENCODEC)), fields)
    pattern = get_pattern(lm.pattern, n_codebooks=lm.model.n_codebooks)
    return MusicPipeline(build_model(lm.model), decoder, text, pattern, sampling_defaults=Sampling(guidance_scale=1.0))


@torch.inference_mode()
def timed(pipe: MusicPipeline, rounds: int) -> dict[str, float]:
    """Median seconds of each stage per second of music; the first round is a warm-up."""
    sampling = pipe.sampling_defaults
    frames = round(SECONDS * pipe.codec.frame_rate)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for seed in range(rounds + 1):
        times_at = [time.perf_counter()]
        both = pipe.text_encoder.encode([PROMPT, ""])
        text, null = (TextCondition(both.embeddings[i : i + 1], both.mask[i : i + 1]) for i in range(2))
        times_at.append(time.perf_counter())
        codes = generate(pipe.model, text, null, pipe.pattern, frames, sampling, [seed])
        times_at.append(time.perf_counter())
        wav = pipe.codec.decode(codes)[0]
        times_at.append(time.perf_counter())
        with tempfile.TemporaryDirectory() as folder:
            audio.write(Path(folder) / "clip.wav", wav, pipe.sample_rate)
        times_at.append(time.perf_counter())
        for stage, start, end in zip(STAGES, times_at, times_at[1:], strict=False):
            times[stage].append((end - start) / SECONDS)
    return {stage: statistics.median(values[1:]) for stage, values in times.items()}


def variants(system: str) -> dict[str, MusicPipeline]:
    """A system; a random one also with guidance in two passes, and with int8 weights."""
    if system not in config.names("recipe") or (Path(system).exists() or system == "tinyttm_tiny"):
        return {system: MusicPipeline.from_pretrained(system, "cpu")}
    whole, guided, int8 = (random_system(system) for _ in range(3))
    guided.sampling_defaults = Sampling()
    quantise(int8.model)
    return {system: whole, f"{system}, guidance in two passes": guided, f"{system}, int8": int8}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=["tiny_lm", "tinyttm_tiny", "tinyttm_89m", "tinyttm_ssm_89m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for system in arguments.systems:
        for name, pipe in variants(system).items():
            parts = components(pipe)
            stages = timed(pipe, arguments.rounds)
            costs = {part.name: part._asdict() for part in [*parts, total(parts)]}
            found[name] = {"stages": stages, "real_time_factor": sum(stages.values()), "costs": costs}
            print(name, found[name]["real_time_factor"], flush=True)
    rows = [["", "M parameters", *(f"{stage}, s" for stage in STAGES), "real-time factor"]]
    for name, result in found.items():
        cells = [f"{result['stages'][stage]:.3f}" for stage in STAGES]
        millions = result["costs"]["all"]["parameters"] / 1e6
        rows.append([name, f"{millions:.1f}", *cells, f"{result['real_time_factor']:.2f}"])
    print(markdown_table(rows))
    RESULTS.write_text(json.dumps({"environment": environment(), "systems": found}, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
