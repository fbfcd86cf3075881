"""A decoding step with int8 weights against float32, one thread, batch 2 (caption and null condition).

    python benchmarks/int8.py

The embedded model, and one of 146 M parameters with random weights.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from paired import paired, report, summary

from ssmttm import MusicPipeline
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.ops.int8 import quantise
from ssmttm.text.condition import TextCondition

BATCH, TEXT = 2, 8
LARGE = TokenLMConfig(n_codebooks=4, codebook_size=2048, d_model=1024, n_layers=12, text_dim=768)


def step_of(model: TokenLM) -> Callable[[], object]:
    """A step after a caption and one frame."""
    c = model.config
    text = TextCondition(torch.randn(BATCH, TEXT, c.text_dim), torch.ones(BATCH, TEXT, dtype=torch.bool))
    codes, state = torch.randint(c.codebook_size, (BATCH, c.n_codebooks)), model.init_state(BATCH)
    model.prefill(codes[..., None], text, state)
    return lambda: model.step(codes, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8"))
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    results = {}
    models = {"tiny_lm": MusicPipeline.from_pretrained("tiny_lm").model, "d 1,024": TokenLM(LARGE).eval()}
    for name, model in models.items():
        cases = {"int8": step_of(quantise(copy.deepcopy(model))), "float32": step_of(model)}
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        results[f"{name}, {size:.1f} M parameters"] = summary(paired(cases, arguments.rounds, name), "int8")
    report(results, arguments.out, "A step with int8 weights")


if __name__ == "__main__":
    main()
