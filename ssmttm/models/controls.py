"""Optional music controls beside the text: per frame the melody's chroma, the position in the bar and the time since
the piece's start and until its end, per item the tempo, the key and the metre.

A model is built for any of them (keys of its config). Where an item has none, a learnt null vector takes its place.
Shapes: B items, T frames (positions in a TokenLM), W embedding width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.audio.notation import KEYS, METRES, beats_of, check_bpm, parse_key, parse_metre
from ssmttm.errors import UserError
from ssmttm.models.conditioning import SinusoidalEmbedding
from ssmttm.ops.linear import Linear

N_PITCH_CLASSES = 12
# Fields of `Controls`, and the key of a model's config that says whether the model takes it.
CONFIG_KEYS = {
    "chroma": "chroma", "bpm": "tempo", "key": "key", "metre": "metre", "bar_position": "bar_position",
    "timing": "timing",
}  # fmt: skip
FRAME_CHANNELS = {"chroma": N_PITCH_CLASSES, "bar_position": 2, "timing": 2}  # of the fields with frames
_DECAYS = (0.5, 2.0, 8.0)  # seconds, of the features of `timing`


class SupportsControls(Protocol):
    """The fields of a model's config that say which controls it was built with."""

    chroma: bool
    tempo: bool
    key: bool
    metre: bool
    bar_position: bool
    timing: bool


@dataclass(frozen=True)
class Controls:
    """Controls of a batch; None where no item has one.

    chroma: [B, 12, T], strength of each pitch class in [0, 1]; NaN where there is none.
    bpm: [B], beats per minute; NaN where an item has none.
    key, metre: int64 [B], classes of `ssmttm.audio.notation`; -1 where an item has none.
    bar_position: [B, 2, T], the phase in the bar and in the beat, in [0, 1), 0 on a bar line; NaN where unknown.
    timing: [B, 2, T], seconds since the start of the piece and until its end; NaN where unknown, each by itself.
    """

    chroma: Tensor | None = None
    bpm: Tensor | None = None
    key: Tensor | None = None
    metre: Tensor | None = None
    bar_position: Tensor | None = None
    timing: Tensor | None = None

    @classmethod
    def create(
        cls, n_items: int, n_frames: int, frame_rate: float, bpm: float | None = None, key: str | None = None,
        metre: str | None = None, device: torch.device | str = "cpu",
    ) -> "Controls":  # fmt: skip
        """The same controls for every item of a clip. With both bpm and metre, frame 0 is on a bar line.

        Args:
            frame_rate: frames per second.
            bpm: beats per minute. key: such as "D minor". metre: such as "3/4".

        Raises:
            UserError: a value is no tempo, key or metre.
        """
        check_bpm(bpm)
        made: dict[str, Tensor] = {}
        if bpm is not None:
            made["bpm"] = torch.full((n_items,), float(bpm), device=device)
        if key is not None:
            made["key"] = torch.full((n_items,), parse_key(key), device=device)
        if metre is not None:
            made["metre"] = torch.full((n_items,), parse_metre(metre), device=device)
        if bpm is not None and metre is not None:
            beats = beats_of(parse_metre(metre))
            times, bar = torch.arange(n_frames, dtype=torch.float64) / frame_rate, 60 * beats / bpm
            lines = bar * torch.arange(int(n_frames / frame_rate / bar) + 2, dtype=torch.float64)
            made["bar_position"] = bar_position(times, lines, beats).to(device).expand(n_items, -1, -1)
        return cls(**made)

    def select_rows(self, rows: slice | Tensor) -> "Controls":
        """Controls of some of the items."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, n: int) -> "Controls":
        """The batch n times: [n * B, ...]."""
        return self._map(lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)))

    @classmethod
    def cat(cls, parts: Sequence["Controls"]) -> "Controls":
        """Batches one after the other; all have the same fields."""
        tensors = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(**{name: None if values[0] is None else torch.cat(values) for name, values in tensors.items()})

    def drop(self, dropped: Tensor) -> "Controls":
        """Controls without any of the items where `dropped`, bool [B], is True."""

        def masked(tensor: Tensor) -> Tensor:
            absent = torch.nan if tensor.is_floating_point() else -1
            return tensor.masked_fill(dropped.view(-1, *[1] * (tensor.ndim - 1)), absent)

        return self._map(masked)

    def to(self, device: torch.device | str) -> "Controls":
        return self._map(lambda tensor: tensor.to(device))

    def select_frames(self, frames: slice) -> "Controls":
        """Controls with a slice of the frames."""
        return self._map_frames(lambda tensor: tensor[..., frames])

    def gather_frames(self, frames: Tensor) -> "Controls":
        """Controls at the given frame numbers, int64 [S]; NaN outside those there are."""

        def gather(tensor: Tensor) -> Tensor:
            length = tensor.shape[-1]
            padded = F.pad(tensor, (0, 1), value=torch.nan)  # [B, C, T + 1]
            return padded[..., frames.where((frames >= 0) & (frames < length), length)]

        return self._map_frames(gather)

    def supported_by(self, config: SupportsControls) -> "Controls":
        """Only the controls that a model of this config was built with."""
        return Controls(**{name: getattr(self, name) for name, key in CONFIG_KEYS.items() if getattr(config, key)})

    def check(self, config: SupportsControls, name: str, batch: int, length: int) -> None:
        """Raises UserError if the model (`name` in the message) was not built with one of them, or a shape is wrong."""
        for field, key in CONFIG_KEYS.items():
            value = getattr(self, field)
            if value is None:
                continue
            shape = (batch, FRAME_CHANNELS[field], length) if field in FRAME_CHANNELS else (batch,)
            if not getattr(config, key):
                raise UserError(f"this {name} was not trained with {key}: leave it out, or set model.{key}=true")
            if tuple(value.shape) != shape:
                raise UserError(f"the {name} takes {field} of shape {list(shape)}, got {list(value.shape)}")

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Controls":
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return Controls(**{name: None if tensor is None else function(tensor) for name, tensor in found.items()})

    def _map_frames(self, function: Callable[[Tensor], Tensor]) -> "Controls":
        changed = {name: function(tensor) for name in FRAME_CHANNELS if (tensor := getattr(self, name)) is not None}
        return replace(self, **changed)


def bar_position(times: Tensor, lines: Tensor, beats: int) -> Tensor:
    """The phases in the bar and in the beat: float32 [2, T], in [0, 1).

    Linear between bar lines. One more bar, as long as its neighbour, is assumed before the first line and after the
    last; NaN outside of these, and with less than two lines.

    Args:
        times: float64 [T], in seconds.
        lines: float64 [n], rising times of bar lines in seconds.
        beats: of a bar.
    """
    if len(lines) < 2:
        return torch.full((2, len(times)), torch.nan)
    lines = torch.cat([2 * lines[:1] - lines[1:2], lines, 2 * lines[-1:] - lines[-2:-1]])  # [n + 2]
    before = torch.searchsorted(lines, times, right=True) - 1  # [T], the last line that is not after
    bar = before.clamp(0, len(lines) - 2)
    phase = (times - lines[bar]) / (lines[bar + 1] - lines[bar])
    return torch.stack([phase, beats * phase % 1]).masked_fill(before != bar, torch.nan).float()


class ChromaEmbedding(nn.Module):
    """A linear map of each frame's pitch classes; a learnt vector where there are none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(N_PITCH_CLASSES, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, chroma: Tensor | None) -> Tensor:
        """[B, 12, T] -> [B, T, W]; None -> [1, 1, W]."""
        if chroma is None:
            return self.null[None, None]
        absent = chroma.isnan().any(1)[..., None]  # [B, T, 1]
        strengths = chroma.nan_to_num(0.0).transpose(1, 2).to(self.linear.weight.dtype)  # [B, T, 12]
        return torch.where(absent, self.null, self.linear(strengths))

    def flops(self, n_frames: int) -> int:
        return 2 * n_frames * self.linear.weight.numel()

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)


class BarPositionEmbedding(nn.Module):
    """A linear map of the cosines and sines of the phases in the bar and in the beat; a learnt vector where absent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(4, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, phases: Tensor | None) -> Tensor:
        """[B, 2, T] -> [B, T, W]; None -> [1, 1, W]."""
        if phases is None:
            return self.null[None, None]
        absent = phases.isnan().any(1)[..., None]  # [B, T, 1]
        angles = 2 * torch.pi * phases.nan_to_num(0.0).transpose(1, 2)  # [B, T, 2]
        circle = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear.weight.dtype)  # [B, T, 4]
        return torch.where(absent, self.null, self.linear(circle))

    def flops(self, n_frames: int) -> int:
        return 2 * n_frames * self.linear.weight.numel()

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)


class TimingEmbedding(nn.Module):
    """A linear map of exp(-t / decay) of the seconds since the start and of those until the end, so that the middle of
    a piece is the same however long it is; a learnt vector for each of the two where it is absent. What to condition on
    is that of arXiv 2402.04825, section 3.2 (seconds_start and seconds_total)."""

    decays: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = (Linear(len(_DECAYS), width) for _ in range(2))
        self.null = nn.Parameter(torch.zeros(2, width))
        self.register_buffer("decays", torch.tensor(_DECAYS), persistent=False)

    def forward(self, timing: Tensor | None) -> Tensor:
        """[B, 2, T] -> [B, T, W]; None -> [1, 1, W]."""
        if timing is None:
            return self.null.sum(0)[None, None]
        absent = timing.isnan()[..., None]  # [B, 2, T, 1]
        seconds = timing.nan_to_num(0.0).clamp(min=0)[..., None]  # [B, 2, T, 1]
        near = torch.exp(-seconds / self.decays).to(self.start.weight.dtype)  # [B, 2, T, 3]
        start = torch.where(absent[:, 0], self.null[0], self.start(near[:, 0]))  # [B, T, W]
        return start + torch.where(absent[:, 1], self.null[1], self.end(near[:, 1]))

    def flops(self, n_frames: int) -> int:
        return 4 * n_frames * self.start.weight.numel()

    def init_weights(self, std: float) -> None:
        for linear in (self.start, self.end):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


class TempoEmbedding(nn.Module):
    """A sinusoidal embedding of log tempo; a learnt vector where the tempo is absent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.number = SinusoidalEmbedding(width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, bpm: Tensor | None) -> Tensor:
        """[B] -> [B, W]; None -> [1, W]."""
        if bpm is None:
            return self.null[None]
        hundredths = 100 * bpm.nan_to_num(1.0).log2()  # hundredths of an octave
        return torch.where(bpm.isnan()[:, None], self.null, self.number(hundredths))

    def flops(self) -> int:
        return self.number.flops()

    def init_weights(self, std: float) -> None:
        self.number.init_weights(std)


class ClassEmbedding(nn.Module):
    """A vector for each class of a control; a learnt vector where it is absent."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(n_classes, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, classes: Tensor | None) -> Tensor:
        """int64 [B], -1 where absent -> [B, W]; None -> [1, W]."""
        if classes is None:
            return self.null[None]
        return torch.where((classes < 0)[:, None], self.null, self.classes(classes.clamp(min=0)))

    def flops(self) -> int:
        return 0

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.classes.weight, std=std)


class ControlledModel(nn.Module):
    """A model with embeddings of the controls of its config."""

    chroma: ChromaEmbedding | None
    tempo: TempoEmbedding | None
    key: ClassEmbedding | None
    metre: ClassEmbedding | None
    bar_position: BarPositionEmbedding | None
    timing: TimingEmbedding | None

    def add_control_embeddings(self, config: SupportsControls, frame_width: int, item_width: int) -> None:
        """Build the embeddings: of per-frame controls with `frame_width`, of an item's with `item_width`."""
        self.chroma = ChromaEmbedding(frame_width) if config.chroma else None
        self.tempo = TempoEmbedding(item_width) if config.tempo else None
        self.key = ClassEmbedding(len(KEYS), item_width) if config.key else None
        self.metre = ClassEmbedding(len(METRES), item_width) if config.metre else None
        self.bar_position = BarPositionEmbedding(frame_width) if config.bar_position else None
        self.timing = TimingEmbedding(frame_width) if config.timing else None

    def embed_frames(self, controls: Controls) -> Iterator[Tensor]:
        """The embedding of each per-frame control, [B, T, W], or [1, 1, W] if no item has one."""
        if self.chroma is not None:
            yield self.chroma(controls.chroma)
        if self.bar_position is not None:
            yield self.bar_position(controls.bar_position)
        if self.timing is not None:
            yield self.timing(controls.timing)

    def embed_items(self, controls: Controls) -> Iterator[Tensor]:
        """The embedding of each control of an item, [B, W], or [1, W] if no item has one."""
        if self.tempo is not None:
            yield self.tempo(controls.bpm)
        if self.key is not None:
            yield self.key(controls.key)
        if self.metre is not None:
            yield self.metre(controls.metre)

    def control_flops(self, n_frames: int) -> int:
        """FLOPs of the embeddings of one item."""
        by_frame = (self.chroma, self.bar_position, self.timing)
        of_frames = sum(part.flops(n_frames) for part in by_frame if part is not None)
        return of_frames + sum(part.flops() for part in (self.tempo, self.key, self.metre) if part is not None)

    def init_control_embeddings(self, std: float) -> None:
        for part in (self.chroma, self.tempo, self.key, self.metre, self.bar_position, self.timing):
            if part is not None:
                part.init_weights(std)
