"""Sampling on a GPU: checks of the captured step, then its speed, in less than 8 minutes.

    python -m benchmarks.gpu [--device cpu --sizes debug]

Checks: logits on the GPU against the CPU, and tokens of the CUDA graph against those of single steps. Speed: a position
with guidance and draw, in single steps and as a graph, float32 and bfloat16, 1 to 32 items; the share of the bandwidth
limit (weights once, states twice, over the rate of copying); prefill of items one by one and at once; a clip. Parts
that no time is left for are named as skipped.
Writes benchmarks/results/gpu.json. On a CPU, where graphs are function calls, it only shows that the script runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import environment
from ssmttm import MusicPipeline
from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.generation.engines.captured import CapturedSteps
from ssmttm.generation.engines.reference import TorchEngine, TorchSteps
from ssmttm.generation.request import Sampling
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.patterns import get_pattern
from ssmttm.text.condition import TextCondition

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MINUTES = 7.0
TEXT = 12  # tokens
SIZES: dict[str, dict[str, Any]] = {
    "debug": {"n_codebooks": 4, "codebook_size": 64, "d_model": 64, "n_layers": 2, "d_state": 16, "headdim": 16},
    "10 M": {"n_codebooks": 8, "codebook_size": 1024, "d_model": 256, "n_layers": 8, "d_state": 64},
    "281 M (Prefix SiMBA's shape)": {
        "n_codebooks": 9, "codebook_size": 1024, "d_model": 1024, "n_layers": 24, "d_state": 512, "headdim": 64,
    },
    "300 M": {"n_codebooks": 4, "codebook_size": 2048, "d_model": 1024, "n_layers": 24, "block": "mamba"},
}  # fmt: skip
KINDS: dict[str, type] = {"single steps": TorchSteps, "captured": CapturedSteps}


class Bound(TorchEngine):
    """The torch engine with a given kind of steps."""

    def __init__(self, model: TokenLM, kind: str) -> None:
        super().__init__(model, exact=False)
        self.kind, self.batched_prefill = kind, True

    def bind(self, state: Any, n_items: int, n_conditional: int | None = None) -> Any:
        return KINDS[self.kind](self, state, n_items, n_conditional)


def captions(n: int, width: int, device: torch.device, dtype: torch.dtype) -> TextCondition:
    generator = torch.Generator().manual_seed(n)
    embeddings = torch.randn(n, TEXT, width, generator=generator).to(device, dtype)
    return TextCondition(embeddings, torch.ones(n, TEXT, dtype=torch.bool, device=device))


def sampler(model: TokenLM, kind: str, items: int, frames: int | None = None) -> CodeSampler:
    weight = model.embedding.weight
    text, null = (captions(n, model.config.text_dim, weight.device, weight.dtype) for n in (items, 1))
    pattern = get_pattern("delay", n_codebooks=model.config.n_codebooks)
    conditions = TextConditions([text], null)
    return CodeSampler(model, conditions, pattern, frames, Sampling(), list(range(items)), engine=Bound(model, kind))


def check(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Raises AssertionError if logits differ from the CPU's, or a graph's tokens from those of single steps."""
    torch.manual_seed(0)
    model = TokenLM(TokenLMConfig(**config)).eval()
    codes = torch.randint(model.config.codebook_size, (2, model.config.n_codebooks, 20))
    text = captions(2, model.config.text_dim, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        expected = model(codes, text)
        model.to(device)
        state = model.init_state(2, device=device)
        found = [model.prefill(codes[..., :10].to(device), text.to(device), state)]
        found += [model.step(codes[..., s].to(device), state) for s in range(10, 20)]
    error = float((torch.stack(found, 2).cpu() - expected[..., 9:, :]).abs().max())
    assert error < 1e-3, f"logits differ by {error}"
    tokens = {kind: sampler(model, kind, 3, 60).next_frames(60) for kind in KINDS}
    same = torch.equal(*tokens.values())
    assert same, "a captured step samples other tokens than single steps"
    return {"max_error": error, "tokens_equal": same}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 1):
        synchronise(device)
        begun = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by copying a gigabyte (on a CPU, a sixteenth)."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def step_times(config: dict[str, Any], device: torch.device, rate: float, positions: int) -> dict[str, Any]:
    """A position with guidance and draw, by dtype, items and kind of steps."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = TokenLM(TokenLMConfig(**config)).eval().to(device, dtype)
        weights = sum(p.nbytes for p in (*model.blocks.parameters(), *model.heads.parameters()))
        for items in (1, 8, 32):
            for kind in KINDS:
                running = sampler(model, kind, items)
                states = [sublayer.inner for block in running._rows[0].state.blocks for sublayer in block]
                tensors = [v for s in states if s is not None for v in vars(s).values() if isinstance(v, Tensor)]
                carried = 2 * sum(tensor.nbytes for tensor in tensors)
                seconds = median_seconds(lambda r=running: r.next_frames(positions), device) / positions
                found[f"{str(dtype)[6:]}, {items} items, {kind}"] = {
                    "ms": 1e3 * seconds, "share_of_limit": (weights + carried) / rate / seconds,
                }  # fmt: skip
    return found


def prefill_times(config: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Milliseconds until the first logits of 8 items, one by one and at once."""
    model = TokenLM(TokenLMConfig(**config)).eval().to(device)

    def run(batched: bool) -> None:
        engine = Bound(model, "single steps")
        engine.batched_prefill = batched
        text, null = (captions(n, model.config.text_dim, device, torch.float32) for n in (8, 1))
        pattern = get_pattern("delay", n_codebooks=model.config.n_codebooks)
        CodeSampler(model, TextConditions([text], null), pattern, 10, Sampling(), list(range(8)), engine=engine)

    names = {"one by one": False, "at once": True}
    return {name: 1e3 * median_seconds(lambda b=batched: run(b), device) for name, batched in names.items()}


def clip_time(device: torch.device) -> dict[str, float]:
    """Seconds from a prompt to the audio of 10 s, with the embedded model."""
    pipe = MusicPipeline.from_pretrained(device=device)
    return {"seconds": median_seconds(lambda: pipe("a slow waltz in D minor on a music box", 10.0), device, 3)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[name for name in SIZES if name != "debug"])
    parser.add_argument("--positions", type=int, default=64, help="sampled in a measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    device, begun = torch.device(arguments.device), time.perf_counter()
    torch.set_grad_enabled(False)
    rate = copy_rate(device)
    results: dict[str, Any] = {"environment": environment(), "copied_GB_s": rate / 1e9}
    parts: dict[str, Callable[[], Any]] = {"check, debug": lambda: check(SIZES["debug"], device)}
    parts["check, Mamba-1"] = lambda: check(SIZES["debug"] | {"layers": "mamba1"}, device)
    for name in arguments.sizes:
        parts[f"step, {name}"] = lambda n=name: step_times(SIZES[n], device, rate, arguments.positions)
    parts["prefill of 8 items"] = lambda: prefill_times(SIZES[arguments.sizes[0]], device)
    if device.type == "cuda":
        parts["clip of 10 s"] = lambda: clip_time(device)
    for name, part in parts.items():
        late = time.perf_counter() - begun > 60 * MINUTES
        results[name] = "skipped: no time left" if late else part()
        print(name, json.dumps(results[name], indent=1), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
