"""The keys of a config's `model` section: types, defaults and checks of TokenLM and LatentDenoiser."""

from dataclasses import dataclass, field
from typing import Any

from ssmttm.errors import UserError, check_sizes

_MIXER_OPTIONS = ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size", "n_heads", "dropout")


@dataclass
class BackboneConfig:
    """Keys of a config's `model` section that every kind of model has.

    layers: the name of a mixer, or a list of names that is repeated over the depth. n_heads: of attention and
    cross-attention. text_norm: LayerNorm after the text projection. chroma, tempo, key, metre, bar_position, timing:
    controls that the model is built with.
    """

    n_codebooks: int = 8
    d_model: int = 256
    n_layers: int = 8
    layers: Any = "mamba2"  # str | list[str], a union that OmegaConf does not have
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
    key: bool = False
    metre: bool = False
    bar_position: bool = False
    timing: bool = False

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


@dataclass
class TokenLMConfig(BackboneConfig):
    """Keys of a config's `model` section, besides those of `BackboneConfig`.

    block: "simba" (mixer and MLP) or "mamba" (two mixers). mlp_bias, attention_bias: biases of the MLP and of
    attention's output projection. conditioning: "prefix", "cross_attention" or "adaln". positions: "none";
    "sinusoidal", counting the audio from 0 and a text prefix down to it; "joint", sinusoidal over prefix and audio
    together, as in the paper's released code; "rotary", in attention layers. norm: "rms" or "layer". layer_scale:
    initial value of every sublayer's learnt scale; null: none. predict_special: the special token has a logit.
    init_std: standard deviation of embeddings and heads at initialisation, with residual projections scaled down by the
    depth; null keeps PyTorch's defaults, as the paper's released code does. predict_controls: a head that predicts
    tempo, key and metre from the caption, where the model has them; see `ssmttm.models.control_predictor`.
    """

    codebook_size: int = 1024
    block: str = "simba"
    mlp_bias: bool = True
    attention_bias: bool = True
    conditioning: str = "prefix"
    positions: str = "none"
    norm: str = "rms"
    layer_scale: float | None = None
    final_norm: bool = True
    predict_special: bool = False
    init_std: float | None = 0.02
    predict_controls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("block", self.block, "simba", "mamba")
        _check_choice("conditioning", self.conditioning, "prefix", "cross_attention", "adaln")
        _check_choice("positions", self.positions, "none", "sinusoidal", "joint", "rotary")
        _check_choice("norm", self.norm, "rms", "layer")
        check_sizes(codebook_size=self.codebook_size)
        if self.positions == "joint" and self.conditioning != "prefix":
            raise UserError("model.positions=joint counts a text prefix: set conditioning=prefix or other positions")
        if self.positions == "rotary" and "attention" not in self.layer_names:
            raise UserError("model.positions=rotary acts in attention layers, and model.layers has none: set another")
        if self.predict_controls and not (self.tempo or self.key or self.metre):
            raise UserError("model.predict_controls=true predicts tempo, key or metre: set one of them to true")
        if self.tempo and self.d_model % 2:
            raise UserError(f"model.tempo=true needs an even model.d_model, got {self.d_model}")


@dataclass
class LatentDenoiserConfig(BackboneConfig):
    """Keys of a config's `model` section, besides those of `BackboneConfig`.

    n_codebooks, codebook_dim: of the codec. n_coarse_codebooks: how many codebooks are given. vae_channels: channels of
    the latents of a VAE, which are generated in place of the other codebooks, so that n_codebooks are the coarse ones
    alone; 0: codebooks. vae_frames: of these latents, per code frame. network: "stack" (blocks of bidirectional mixers)
    or "unet". time_dim: width of the timestep embedding, which also holds the noise level of the coarse latents, the
    mean text token, tempo, key and metre. unet_mults: width of each level of the U-Net, each at half the frame rate of
    the one before, as a multiple of d_model. unet_blocks: residual blocks per level.
    """

    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 6
    codebook_dim: int = 8
    n_coarse_codebooks: int = 1
    vae_channels: int = 0
    vae_frames: int = 1
    network: str = "stack"
    time_dim: int = 128
    unet_mults: list[int] = field(default_factory=lambda: [1, 1, 2])
    unet_blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(codebook_dim=self.codebook_dim, n_layers=self.n_layers, vae_frames=self.vae_frames)
        if self.vae_channels < 0:
            raise UserError(f"model.vae_channels must be at least 0 (0: no VAE), got {self.vae_channels}")
        if self.vae_channels and self.n_coarse_codebooks != self.n_codebooks:
            raise UserError(
                "with model.vae_channels all codebooks of the model are coarse ones: set model.n_codebooks="
                f"{self.n_coarse_codebooks}, as model.n_coarse_codebooks"
            )
        if not self.vae_channels and not 1 <= self.n_coarse_codebooks < self.n_codebooks:
            raise UserError(
                f"model.n_coarse_codebooks must be at least 1 and below n_codebooks={self.n_codebooks}, "
                f"got {self.n_coarse_codebooks}"
            )
        _check_choice("network", self.network, "stack", "unet")
        if not self.unet_mults:
            raise UserError("model.unet_mults is empty: give at least one level")
        if self.time_dim % 2:
            raise UserError(f"model.time_dim must be even, got {self.time_dim}")

    @property
    def coarse_channels(self) -> int:
        """S."""
        return self.n_coarse_codebooks * self.codebook_dim

    @property
    def noisy_channels(self) -> int:
        """C."""
        codebooks = self.n_codebooks - self.n_coarse_codebooks
        return codebooks * self.codebook_dim + self.vae_channels * self.vae_frames

    @property
    def group_sizes(self) -> list[int]:
        """Channels with a mean and a standard deviation of their own: of each codebook, then of each channel of the
        VAE, in its patches."""
        return [self.codebook_dim] * self.n_codebooks + [self.vae_frames] * self.vae_channels


def _check_choice(key: str, value: str, *choices: str) -> None:
    """Raises UserError unless the value of a `model` key is one of the choices."""
    if value not in choices:
        raise UserError(f"unknown model.{key} {value!r}: choose from {', '.join(choices)}")
