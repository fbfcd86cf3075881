"""Tempo, key and metre given the caption: distributions from which controls are drawn where none is given.

A caption such as "a slow waltz" leaves the tempo open, and a model that is conditioned on the tempo and the position in
the bar is better at keeping them than at guessing them. So they are planned before the music, as the language model
of arXiv 2602.00744 plans its metadata. The predictor reads the mean of the caption's token embeddings.
Shapes: B captions, L text tokens, E text embedding width, N tempo classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.audio.notation import KEYS, METRES
from ssmttm.config.model import TokenLMConfig
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition

MIN_BPM, MAX_BPM, N_TEMPI = 30.0, 300.0, 96  # of the tempo classes, at equal ratios of 2.4 %
_WIDTH = 256
_TEMPERATURE = 0.5  # of the draws: what a caption states is kept, what it leaves open still varies


class ControlPredictor(nn.Module):
    """One hidden layer, and a softmax for each of tempo, key and metre that the model's config has."""

    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.text_dim)
        self.hidden = nn.Linear(config.text_dim, _WIDTH)
        classes = {"bpm": N_TEMPI * config.tempo, "key": len(KEYS) * config.key, "metre": len(METRES) * config.metre}
        self.heads = nn.ModuleDict({name: nn.Linear(_WIDTH, n) for name, n in classes.items() if n})

    def forward(self, text: TextCondition) -> dict[str, Tensor]:
        """Logits of the classes of each control, [B, N] of `bpm`, [B, 24] of `key`, [B, 8] of `metre`."""
        tokens = text.embeddings.float().masked_fill(~text.mask[..., None], 0)  # [B, L, E]
        mean = tokens.sum(1) / text.mask.sum(1, keepdim=True).clamp(min=1)  # [B, E]
        hidden = F.gelu(self.hidden(self.norm(mean.to(self.norm.weight.dtype))))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def draw(self, text: TextCondition, uniforms: Tensor) -> Controls:
        """Controls of B captions drawn from their distributions, one by one; fields without a head are None.

        Args:
            uniforms: [B, 3] in [0, 1), for tempo, key and metre.
        """
        logits, drawn = self(text), dict[str, Tensor]()
        for column, name in enumerate(("bpm", "key", "metre")):
            if name not in self.heads:
                continue
            cumulative = (logits[name].double() / _TEMPERATURE).softmax(-1).cumsum(-1)  # [B, N]
            bound = uniforms[:, column, None].double() * cumulative[:, -1:]
            classes = torch.searchsorted(cumulative, bound, right=True)[:, 0].clamp(max=cumulative.shape[-1] - 1)  # [B]
            drawn[name] = tempo_of_class(classes) if name == "bpm" else classes
        return Controls(**drawn)


def prediction_losses(logits: dict[str, Tensor], stated: Controls) -> dict[str, Tensor]:
    """The cross-entropy of each control, summed over the items that state it: scalars.

    Args:
        logits: of a ControlPredictor.
        stated: what the items state; None, NaN or -1 where nothing.
    """
    losses = {}
    for name, scores in logits.items():
        value = getattr(stated, name)  # [B]
        classes = class_of_tempo(value) if name == "bpm" else value
        losses[name] = F.cross_entropy(scores, classes, ignore_index=-1, reduction="sum")
    return losses


def class_of_tempo(bpm: Tensor) -> Tensor:
    """The class nearest to each tempo, int64; -1 where it is NaN. Tempi out of range get the outermost class."""
    octaves = (bpm.nan_to_num(MIN_BPM) / MIN_BPM).log2() / math.log2(MAX_BPM / MIN_BPM)
    return (octaves * (N_TEMPI - 1)).round().clamp(0, N_TEMPI - 1).long().masked_fill(bpm.isnan(), -1)


def tempo_of_class(classes: Tensor) -> Tensor:
    """Beats per minute of tempo classes, float32."""
    return (MIN_BPM * (MAX_BPM / MIN_BPM) ** (classes.double() / (N_TEMPI - 1))).float()
