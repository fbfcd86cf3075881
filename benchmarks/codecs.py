"""Codecs on the same held-out music of the built-in composer: quality with all and fewer codebooks, time on one thread.

    python -m benchmarks.codecs old=tiny new=exported/codec new@8=exported/codec --seed 999

NAME@K=CODEC uses the first K codebooks. Clip i is 10 s from the middle of piece i of the seed. Quality: means, and
bootstrap 95 % intervals of the difference from the first codec, clip by clip. Time: whole clips in turn.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paired import environment, paired, summary
from data_prep.builtin import compose
from data_prep.builtin.synth import render
from ssmttm.codecs import Codec, load_codec
from ssmttm.codecs.metrics import codec_quality

SECONDS = 10.0
QUALITY = ("mel_distance", "chroma_similarity", "onset_f")


def clips(seed: int, count: int, sample_rate: int) -> list[Tensor]:
    """Clips of held-out music, [1, 1, S] each."""
    length = round(SECONDS * sample_rate)
    found = []
    for index in tqdm(range(count), desc="held-out pieces", leave=False):
        wav = render(compose(seed, index), sample_rate)
        start = (len(wav) - length) // 2
        found.append(torch.from_numpy(wav[start : start + length]).float()[None, None])
    return found


def compare(metrics: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, object]]]:
    """Means of the metrics of each clip, [n], and 95 % bootstrap intervals of the difference from the first codec."""
    first, *others = metrics
    rng = np.random.default_rng(0)
    draws = rng.integers(len(metrics[first][QUALITY[0]]), size=(4000, len(metrics[first][QUALITY[0]])))
    differences = {name: {key: metrics[name][key] - metrics[first][key] for key in QUALITY} for name in others}
    intervals = {
        f"{name} - {first}": {
            key: np.percentile(values[draws].mean(1), (2.5, 97.5)).tolist() for key, values in d.items()
        }
        for name, d in differences.items()
    }
    means = {name: {key: float(rows[key].mean()) for key in QUALITY} for name, rows in metrics.items()}
    return {"means": means, "differences_95": intervals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codecs", nargs="+", metavar="NAME[@K]=CODEC", help="a codec or its folder")
    parser.add_argument("--seed", type=int, default=999, help="of the pieces, another than that of the training data")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codecs.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codecs: dict[str, Codec] = {}
    for given in arguments.codecs:
        name, _, source = given.partition("=")
        kept = name.partition("@")[2]
        codecs[name] = load_codec(source, int(kept) if kept else None)
    first = next(iter(codecs))
    music = clips(arguments.seed, arguments.clips, codecs[first].sample_rate)
    rows = {name: [codec_quality(codec, clip) for clip in tqdm(music, desc=name, leave=False)]
            for name, codec in codecs.items()}  # fmt: skip
    codes = {name: codec.encode(music[0]) for name, codec in codecs.items()}
    times = paired({name: lambda n=name: codecs[n].decode(codes[n]) for name in codecs}, arguments.rounds, "decoding")
    timed = summary(times, first)
    for name, codec in codecs.items():
        timed[name] |= {"times_real_time": 1e3 * SECONDS / timed[name]["median_ms"], "kbps": rows[name][0]["kbps"],
                        "look_ahead_ms": codec.look_ahead_ms,
                        "parameters": sum(p.numel() for p in codec.parameters())}  # fmt: skip
        usage = torch.cat([codec.encode(clip) for clip in music], dim=-1)  # [1, K, T]
        used = [len(usage[0, k].unique()) / codec.codebook_size for k in range(usage.shape[1])]
        timed[name]["codebook_usage"] = min(used)
    metrics = {name: {key: np.array([row[key] for row in values]) for key in QUALITY} for name, values in rows.items()}
    document = {
        "environment": environment(), "seed": arguments.seed, "clips": len(music), "clip_seconds": SECONDS,
        "quality": compare(metrics), "codecs": timed,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
