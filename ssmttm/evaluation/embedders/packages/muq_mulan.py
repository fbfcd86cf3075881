"""MuQ-MuLan through the package muq: music and captions in one space."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.weights import import_package, load_pretrained, model_fingerprint


class MuqMulanEmbedder:
    """MuQ-MuLan (arXiv 2501.01108), `weights`: a folder or hub name; it also loads the MuQ and the text model that its
    config names. Windows are those of the model, mostly 10 s.

    Captions are embedded one by one: in a batch, the package averages over the padding too, so that the embedding of a
    caption would depend on the longest of its batch.
    """

    name = "muq_mulan"
    settings: Mapping[str, Any] = {"captions": "one by one"}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

        package = import_package("muq_mulan", "muq", "muq")
        self.model = load_pretrained(package.MuQMuLan.from_pretrained, weights or "OpenMuQ/MuQ-MuLan-large")
        self.model.to(device).eval()
        for module in self.model.modules():
            if isinstance(module, Wav2Vec2ConformerEncoder):
                _return_hidden_states(module)
        self.sample_rate, self.seconds = int(self.model.sr), float(self.model.clip_secs)
        self.dim = int(self.model.config.mulan.dim_latent)
        self.fingerprint = model_fingerprint(self.model, self.settings)

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Windows, each of norm 1: wav [B, S] -> [B, W, D]."""
        clips = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        latents = self.model.mulan_module.get_audio_latents(clips.flatten(0, 1).contiguous().to(self.model.device))
        return latents.float().cpu().unflatten(0, clips.shape[:2])

    def joint_audio(self, wav: Tensor) -> Tensor:
        """Mean of the windows, of norm 1: wav [B, S] -> [B, D]."""
        return F.normalize(self.embed(wav).mean(1), dim=-1)

    @torch.inference_mode()
    def joint_text(self, captions: Sequence[str]) -> Tensor:
        """Captions, each of norm 1: [n, D]."""
        latents = [self.model.extract_text_latents([caption]) for caption in captions]
        return F.normalize(torch.cat(latents).float().cpu(), dim=-1)


def _return_hidden_states(encoder: Any) -> None:
    """Let an encoder return the input of each layer and its output, as before version 5 of transformers: muq 0.1 reads
    them, and leaves a field out of the config."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder.config._attn_implementation = "eager"
    states: list[Tensor] = []

    def finish(module: Any, given: Any, output: Any) -> BaseModelOutput:
        found = (*states, output.last_hidden_state)
        states.clear()
        return BaseModelOutput(last_hidden_state=output.last_hidden_state, hidden_states=found)

    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    encoder.register_forward_hook(finish)
