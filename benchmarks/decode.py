"""One decoding step at two positions against other implementations, one thread, batch 2 (caption and null condition).

    python -m benchmarks.decode --out benchmarks/results/decode

Baselines of the same size: transformers' Mamba2ForCausalLM with its cache, and transformers' MusicGen decoder with its
cache (`--width 1024 --layers 24` is MusicGen-small's). A case's ratio is its time over that of ssmttm's Mamba-2.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MusicgenDecoderConfig, MusicgenForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.paired import paired, report, summary
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.text.condition import TextCondition

BATCH, K, V, TEXT = 2, 4, 2048, 20
POSITIONS = (64, 1500)
OURS = "ssmttm Mamba-2"
Step = Callable[[], object]


def ssmttm_step(config: TokenLMConfig, position: int) -> Step:
    """A step after `position` frames of prefill."""
    model = TokenLM(config).eval()
    text = TextCondition(torch.randn(BATCH, TEXT, config.text_dim), torch.ones(BATCH, TEXT, dtype=torch.bool))
    state = model.init_state(BATCH)
    model.prefill(torch.randint(V, (BATCH, K, position)), text, state)
    codes = torch.randint(V, (BATCH, K))
    return lambda: model.step(codes, state)


def transformers_mamba2(width: int, mixers: int, position: int) -> Step:
    """The same mixers in transformers' model; its vocabulary is that of all codebooks together."""
    config = Mamba2Config(
        vocab_size=K * V, hidden_size=width, state_size=128, num_hidden_layers=mixers, expand=2, head_dim=64,
        num_heads=2 * width // 64, n_groups=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(V, (BATCH, position)), use_cache=True).cache_params
    token = torch.randint(V, (BATCH, 1))

    @torch.no_grad()
    def step() -> object:
        return model(token, cache_params=cache, use_cache=True).logits

    return step


def transformers_musicgen(width: int, layers: int, position: int) -> Step:
    """MusicGen's decoder; the newest position is cropped from the cache after every step."""
    config = MusicgenDecoderConfig(
        hidden_size=width, num_hidden_layers=layers, ffn_dim=4 * width, num_attention_heads=width // 64,
        num_codebooks=K, vocab_size=V,
    )  # fmt: skip
    model = MusicgenForCausalLM(config).eval()
    text = torch.randn(BATCH, TEXT, width)
    with torch.no_grad():
        ids = torch.randint(V, (BATCH * K, position))
        cache = model(ids, encoder_hidden_states=text, use_cache=True).past_key_values
    token = torch.randint(V, (BATCH * K, 1))

    @torch.no_grad()
    def step() -> object:
        logits = model(token, encoder_hidden_states=text, past_key_values=cache, use_cache=True).logits
        kept = cache if isinstance(cache, DynamicCache) else cache.self_attention_cache
        kept.crop(-1)
        return logits

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8, help="of the Transformers; Mamba-2 has twice as many mixers")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    width, layers = arguments.width, arguments.layers
    sizes = {"n_codebooks": K, "codebook_size": V, "d_model": width, "n_layers": layers, "d_state": 128}
    mamba = TokenLMConfig(**sizes, block="mamba")
    transformer = TokenLMConfig(
        **sizes, layers="attention", conditioning="cross_attention", mlp_ratio=4.0, n_heads=width // 64
    )
    cases: dict[str, Step] = {}
    for position in POSITIONS:
        cases |= {
            f"{OURS}, position {position}": ssmttm_step(mamba, position),
            f"ssmttm Transformer, position {position}": ssmttm_step(transformer, position),
            f"transformers Mamba2, position {position}": transformers_mamba2(width, 2 * layers, position),
            f"transformers MusicGen, position {position}": transformers_musicgen(width, layers, position),
        }
    times = paired(cases, arguments.rounds, f"decode, d {width}")
    title = f"A decoding step, d {width}, {layers} layers ({2 * layers} Mamba-2 mixers), batch {BATCH}, float32"
    report({title: summary(times, f"{OURS}, position {POSITIONS[0]}")}, arguments.out, "Decoding")


if __name__ == "__main__":
    main()
