"""Small token language models and captions for tests."""

import torch

from ssmttm import config
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.text.condition import TextCondition

K, V, E, S = 3, 16, 12, 21
SMALL = {
    "n_codebooks": K, "codebook_size": V, "d_model": 16, "n_layers": 2, "d_state": 8, "headdim": 8, "chunk_size": 8,
    "text_dim": E, "n_heads": 2,
}  # fmt: skip
VARIANTS = {
    "ours": {},
    "paper": {"positions": "sinusoidal", "final_norm": False, "predict_special": True, "init_std": None},
    "released": {"positions": "joint", "final_norm": False, "predict_special": True, "init_std": None},
    "mamba": {"block": "mamba", "layers": ["mamba2", "mamba2"], "ngroups": 2},
    "cross simba": {"conditioning": "cross_attention", "positions": "sinusoidal", "final_norm": False},
    "cross transformer": {"conditioning": "cross_attention", "layers": "attention", "positions": "sinusoidal"},
    "cross mamba": {"conditioning": "cross_attention", "block": "mamba", "layer_scale": 0.1},
    "prefix transformer": {"layers": "attention", "positions": "rotary"},
    "hybrid": {"layers": ["mamba2", "attention"], "positions": "rotary", "norm": "layer", "text_norm": False},
    "adaln": {"conditioning": "adaln", "mlp_bias": False},
}


def preset(name, *overrides):
    """The `model` section of a config in configs/model."""
    return config.load(f"model={name}", *(f"model.{override}" for override in overrides)).model


def randomised(model):
    """Perturb all parameters, so that zero-initialised ones have an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def small_token_lm(**changes):
    torch.manual_seed(0)
    return TokenLM(TokenLMConfig(**{**SMALL, **changes}))


def captions(*lengths, seed=2):
    """Random token embeddings of captions with these numbers of tokens."""
    g = torch.Generator().manual_seed(seed)
    return TextCondition.stack([torch.randn(n, E, generator=g) for n in lengths])


def assert_equal(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
