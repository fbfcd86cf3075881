"""Embedders by name. Each is imported when it is asked for."""

from importlib import import_module

from torch import Tensor

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders.base import Embedder

EMBEDDERS = {
    "tiny": ("tiny", "TinyEmbedder"),
    "log_mel": ("log_mel", "LogMelEmbedder"),
    "codec": ("codec_latents", "CodecEmbedder"),
    "clap": ("hub", "ClapEmbedder"),
    "ast": ("hub", "AstEmbedder"),
    "panns": ("convnets", "PannsEmbedder"),
    "vggish": ("convnets", "VggishEmbedder"),
}
_WITHOUT_WEIGHTS = ("log_mel",)


def load_embedder(name: str, weights: str | None = None, device: str = "cpu") -> Embedder:
    """Load an embedder.

    Args:
        name: one of EMBEDDERS: tiny (embedded), log_mel (no weights), codec, clap, ast, panns, vggish.
        weights: a file, folder or hub name; None: the embedder's own, where it has some.
        device: where it runs; tiny and log_mel stay on the CPU.

    Raises:
        UserError: there is no such embedder, or its weights are not there.
    """
    if name not in EMBEDDERS:
        raise UserError(f"no embedder {name!r}: there are {', '.join(EMBEDDERS)}")
    module, kind = EMBEDDERS[name]
    made = getattr(import_module(f"{__name__}.{module}"), kind)
    if name == "tiny":
        return made.from_pretrained(weights)
    return made() if name in _WITHOUT_WEIGHTS else made(weights, device)


def mono_at(wav: Tensor, sample_rate: int, embedder: Embedder) -> Tensor:
    """Audio [C, S] as an embedder takes it: the channels' mean at its rate, [1, s]."""
    return audio.resample(audio.to_mono(wav), sample_rate, embedder.sample_rate)

