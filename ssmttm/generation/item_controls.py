"""The controls of a request, by item and frame: those that the caller gave, those drawn from the caption, the timing.

A model with a control predictor (`model.predict_controls`) draws tempo, key and metre of an item where the caller gave
none, so that the position in the bar is known in every clip.
Shapes: n items, T frames.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.audio.features import frame_chroma
from ssmttm.audio.notation import KEYS, METRES
from ssmttm.codecs import Autoencoder
from ssmttm.generation.request import Request
from ssmttm.models.control_predictor import ControlPredictor
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition

_KNOWN_SECONDS = 3600.0  # of a stream without an end: after that its bars and timing are unknown
_STREAM = 1  # of an item's seed: the codes draw from the seed itself


def draw_controls(predictor: ControlPredictor, request: Request, captions: TextCondition) -> Request:
    """The request with tempo, key and metre drawn for every item that has not been given them.

    Each item's are drawn from its own caption with its own seed: the same alone or in a batch, and the random numbers
    of its codes stay as they are.

    Args:
        captions: one of each item, n rows.
    """
    drawn = []
    device = next(predictor.parameters()).device
    for item, seed in enumerate(request.seeds):
        tokens = captions.embeddings[item, captions.mask[item]]  # without padding, which would change the rounding
        own = np.random.SeedSequence([seed, _STREAM]).generate_state(1).item()
        uniforms = torch.rand(1, 3, generator=torch.Generator().manual_seed(own), dtype=torch.float64)
        found = predictor.draw(TextCondition.stack([tokens]).to(device), uniforms.to(device))
        values: dict[str, Any] = {}
        if found.bpm is not None:
            values["bpm"] = round(found.bpm.item(), 2)
        if found.key is not None:
            values["key"] = KEYS[int(found.key)]
        if found.metre is not None:
            values["metre"] = list(METRES)[int(found.metre)]
        drawn.append({name: value for name, value in values.items() if getattr(request, name) is None})
    return replace(request, drawn=drawn)


def describe_controls(request: Request) -> list[dict[str, Any]]:
    """Tempo, key and metre of each item, and the names of those that were drawn, for the metadata; empty if the model
    draws none."""
    if request.drawn is None:
        return []
    found = []
    for item, own in enumerate(request.drawn):
        drawn = [name for name in sorted(own) if getattr(request, name) is None]
        found.append(request.controls_of(item) | {"drawn": drawn})
    return found


def build_controls(
    request: Request, codec: Autoencoder, device: torch.device, n_clip_frames: int = 0, n_frames: int | None = None
) -> Controls:
    """The request's controls for every item, by frame.

    A melody and the bars begin after the frames of a clip that is continued. A melody longer than `n_frames` is cut, a
    shorter one ends early. The timing is that of a whole piece, in which the continued clip is the beginning and which
    ends with the request's duration, if it has one; it is unknown if the request is for a part (`Request.is_whole`).
    """
    rate, n_items = codec.frame_rate, len(request.prompts)
    n_all = n_clip_frames + math.ceil(_KNOWN_SECONDS * rate) if n_frames is None else n_frames
    of_items = [Controls.create(1, n_all - n_clip_frames, rate, **request.controls_of(item)) for item in range(n_items)]
    controls = Controls.cat(of_items).to(device)
    if controls.bar_position is not None:
        bars = F.pad(controls.bar_position, (n_clip_frames, 0), value=torch.nan)
        controls = replace(controls, bar_position=bars)
    if request.is_whole:
        timing = _timing(request.duration, n_clip_frames, n_all, rate)
        controls = replace(controls, timing=timing.to(device).expand(n_items, -1, -1))
    if request.melody is not None:
        chroma = _melody(request.melody, codec, n_clip_frames, n_frames, device)
        controls = replace(controls, chroma=chroma.expand(n_items, -1, -1))
    return controls


def _timing(duration: float | None, n_clip_frames: int, n_frames: int, rate: float) -> Tensor:
    """Seconds since the start and until the end, NaN without one: [2, T]."""
    start = torch.arange(n_frames, dtype=torch.float64) / rate
    end = n_clip_frames / rate + (math.nan if duration is None else duration)
    return torch.stack([start, (end - start).clamp(min=0)]).float()


def _melody(
    melody: Tensor, codec: Autoencoder, n_clip_frames: int, n_frames: int | None, device: torch.device
) -> Tensor:
    """The chroma of audio [channels, S] after a clip, NaN in the clip: [1, 12, T]."""
    length = math.ceil(melody.shape[-1] / codec.hop_length)
    if n_frames is not None:
        length = min(n_frames - n_clip_frames, length)
    wav = melody.mean(0, keepdim=True)[:, : length * codec.hop_length].to(device)
    return F.pad(frame_chroma(wav, codec.sample_rate, length), (n_clip_frames, 0), value=torch.nan)
