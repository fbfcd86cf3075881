"""The dry run of the ICME 2026 challenge (`ssmttm evaluate eval=attm_dry`) on synthetic data in its format: what each
stage costs, and whether a run that is killed twice gives the results of an unbroken one.

    python -m benchmarks.attm_dry --out runs

Everything is written to OUT/attm_dry_benchmark, which is deleted first.
The data have the layout of Song Describer (its table, audio/NN/ID.2min.mp3) and pieces of the built-in composer;
CLAP is a small one with random weights, so that only times and agreement are results, no value of a metric.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import environment
from data_prep.builtin import compose, render
from data_prep.builtin.captions import write_captions
from ssmttm import audio
from ssmttm.reports.tables import markdown_table

RESULTS = Path(__file__).parent / "results" / "attm_dry.json"
FOLDER = "attm_dry_benchmark"  # in OUT
_RATE, _COMPOSER_RATE, _EXCERPTS = 44_100, 24_000, 3  # excerpts of a piece are tracks of one artist
_COLUMNS = (
    "caption_id", "track_id", "caption", "is_valid_subset", "familiarity", "artist_id", "album_id", "path", "duration"
)  # fmt: skip


def write_synthetic_data(folder: Path, n: int, seconds: float) -> list[str]:
    """Write FOLDER/song_describer.csv with its audio, n tracks, and FOLDER/prompts.json with as many prompts.

    Returns:
        Overrides of `ssmttm evaluate eval=attm_dry` with these files.
    """
    rows, prompts = [], []
    for i in range(n):
        if i % _EXCERPTS == 0:
            piece = compose(2605, i // _EXCERPTS)
            music, captions = torch.from_numpy(render(piece))[None], write_captions(piece.truth, piece.id)
        first = round((2 + seconds * (i % _EXCERPTS)) * _COMPOSER_RATE)
        wav = music[:, first : first + round(seconds * _COMPOSER_RATE)]
        number = 1_004_100 + i
        name = f"{number % 100:02d}/{number}"
        audio.write(folder / f"audio/{name}.2min.mp3", audio.resample(wav, _COMPOSER_RATE, _RATE).clamp(-1, 1), _RATE)
        rows.append((i, number, captions[1], True, 0, i // _EXCERPTS, 3 * i, f"{name}.mp3", piece.truth["duration"]))
        tags = [piece.truth["style"], piece.truth["lead"]["name"], piece.truth["mood"]]
        prompts.append({"path": f"{name}.mp3", "caption": captions[i % _EXCERPTS], "tags": tags})
    with (folder / "song_describer.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *rows])
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1))
    return [f"prompts={folder / 'prompts.json'}", f"references={folder / 'audio'}"]


def write_clap(folder: Path, seconds: float) -> str:
    """A small CLAP of random weights, in transformers' format, whose window is `seconds`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        ClapTextConfig,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    torch.manual_seed(0)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3, "in": 4, "a": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)
    audio_config = ClapAudioConfig(
        hidden_size=32, patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], num_hidden_layers=2,
        spec_size=256, num_mel_bins=64, patch_stride=[4, 4], patch_size=4, window_size=8, projection_dim=24,
    )  # fmt: skip
    text_config = ClapTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8,
        projection_dim=24, max_position_embeddings=80,
    )  # fmt: skip
    config = ClapConfig(text_config=text_config.to_dict(), audio_config=audio_config.to_dict(), projection_dim=24)
    ClapModel(config).save_pretrained(folder)
    extractor = ClapFeatureExtractor(truncation="rand_trunc", max_length_s=seconds, frequency_min=50)
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def command(overrides: Sequence[str], out: Path) -> list[str]:
    """`ssmttm evaluate eval=attm_dry` with these overrides."""
    return [sys.executable, "-m", "ssmttm.cli.main", "evaluate", "eval=attm_dry", *overrides, f"out={out}"]


def kill_when(words: Sequence[str], ready: Callable[[], bool], log: Path) -> bool:
    """Run a command, with its output in a file, and kill it once `ready()`. Returns whether it was still running."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        while process.poll() is None and not ready():
            time.sleep(0.005)
        process.kill()
        return process.wait() == -signal.SIGKILL


def measured(out: Path) -> dict[str, Any]:
    """The content of metrics.json, without the music metrics of single clips."""
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    found["music_metrics"] = {name: of["summary"] for name, of in found["music_metrics"].items()}  # without paths
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--tracks", type=int, default=36)
    arguments = parser.parse_args(argv)
    out = arguments.out / FOLDER
    shutil.rmtree(out, ignore_errors=True)
    data = out / "data"
    overrides = write_synthetic_data(data, arguments.tracks, 12.0)
    overrides.append(f"eval.weights.clap={write_clap(data / 'clap', 10)}")
    whole, broken = out / "whole", out / "broken"
    begun = time.perf_counter()
    subprocess.run(command(overrides, whole), check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wall = time.perf_counter() - begun
    half = arguments.tracks // 2
    again = command(overrides, broken)
    log = out / "killed.log"
    kills = [
        kill_when(again, lambda: len(list((broken / "audio").glob("[!.]*.json"))) >= half, log),
        kill_when(again, lambda: bool(list((broken / "embeddings").glob("clap-*"))), log),
    ]
    kept = len(list((broken / "audio").glob("[!.]*.json")))
    subprocess.run(again, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    first, second = measured(whole), measured(broken)
    found = {
        "environment": environment(),
        "tracks": arguments.tracks,
        "wall_seconds": wall,
        "seconds": first["seconds"],
        "killed": kills,
        "clips_kept": kept,
        "seconds_after_two_kills": second["seconds"],
        "results_equal": all(
            first[name] == second[name] for name in ("metrics", "music_metrics", "published", "notes")
        ),
    }
    rows = [["stage", "unbroken, s", "after two kills, s"]]
    rows += [[name, f"{taken:.1f}", f"{second['seconds'][name]:.1f}"] for name, taken in first["seconds"].items()]
    print(markdown_table(rows), f"wall time {wall:.1f} s; killed: {kills}; equal: {found['results_equal']}", sep="\n")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
