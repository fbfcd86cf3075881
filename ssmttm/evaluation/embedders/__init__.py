"""Embedders by name, imported on first use."""

from importlib import import_module

from torch import Tensor

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders.base import Embedder

EMBEDDERS = {
    "tiny": ("tiny", "TinyEmbedder"),
    "log_mel": ("log_mel", "LogMelEmbedder"),
    "codec": ("codec_latents", "CodecEmbedder"),
    "clap": ("clap", "ClapEmbedder"),
    "ast": ("ast", "AstEmbedder"),
    "panns": ("panns", "PannsEmbedder"),
    "vggish": ("vggish", "VggishEmbedder"),
    "passt": ("packages.passt", "PasstEmbedder"),
    "muq_mulan": ("packages.muq_mulan", "MuqMulanEmbedder"),
    "audiobox": ("packages.audiobox", "AudioboxEmbedder"),
}
_WITHOUT_WEIGHTS = ("log_mel",)


def load_embedder(name: str, weights: str | None = None, device: str = "cpu") -> Embedder:
    """Load one of EMBEDDERS from a file, folder or hub name, by default with its own weights, if it has any."""
    if name not in EMBEDDERS:
        raise UserError(f"embedder must be one of {', '.join(EMBEDDERS)}, got {name!r}")
    module, class_name = EMBEDDERS[name]
    embedder_class = getattr(import_module(f"{__name__}.{module}"), class_name)
    if name == "tiny":
        return embedder_class.from_pretrained(weights)
    return embedder_class() if name in _WITHOUT_WEIGHTS else embedder_class(weights, device)


def mono_at(wav: Tensor, sample_rate: int, embedder: Embedder) -> Tensor:
    """Downmix audio [C, S] and resample it to the embedder's rate: [1, s]."""
    return audio.resample(audio.to_mono(wav), sample_rate, embedder.sample_rate)
