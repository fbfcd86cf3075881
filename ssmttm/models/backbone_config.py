"""The options that TokenLM and LatentDenoiser share."""

from dataclasses import dataclass
from typing import Any

from ssmttm.errors import UserError
from ssmttm.mixers.base import check_sizes

_MIXER_OPTIONS = ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size", "n_heads", "dropout")


@dataclass
class BackboneConfig:
    """Keys of a config's `model` section that every kind of model has.

    layers: the name of a mixer, or a list of names that is repeated over the depth. n_heads: of attention and
    cross-attention. text_norm: LayerNorm after the text projection. chroma, tempo: controls the model is built with.
    """

    n_codebooks: int = 8
    d_model: int = 256
    n_layers: int = 8
    layers: str | list[str] = "mamba2"
    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    n_heads: int = 8
    mlp_ratio: float = 2.0
    text_dim: int = 384
    text_norm: bool = True
    dropout: float = 0.0
    chroma: bool = False
    tempo: bool = False

    def __post_init__(self) -> None:
        check_sizes(n_codebooks=self.n_codebooks, text_dim=self.text_dim)
        if not self.layer_names:
            raise UserError("model.layers is empty: name at least one mixer, such as mamba2")

    @property
    def layer_names(self) -> list[str]:
        """One period of the layer pattern."""
        return [self.layers] if isinstance(self.layers, str) else self.layers

    @property
    def mixer_options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _MIXER_OPTIONS}


def check_choice(key: str, value: str, *choices: str) -> None:
    """Raises UserError unless the value of a `model` key is one of the choices."""
    if value not in choices:
        raise UserError(f"unknown model.{key} {value!r}: choose from {', '.join(choices)}")
