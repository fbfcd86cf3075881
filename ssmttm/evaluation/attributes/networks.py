"""The three networks of the attribute classifiers, about 230,000 parameters together.

Sources: attention pooling over log-mel convolutions (Kong et al., arXiv 1711.00927); convolutions along the
log-frequency and log-tempo axes with tempo as a distribution over a grid (Schreiber and Müller, ISMIR 2018, SMC 2019).
"""

import torch
from torch import Tensor, nn

from ssmttm.audio import features

BPM_LOW, BPM_HIGH = 42.0, 215.0  # range of the tempo network


class FamilyNet(nn.Module):
    """Convolutions over log-mel, attention over time: log-mel [B, N_MELS, T] -> logits [B, families]."""

    def __init__(self, n_families: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(nn.Conv2d(1, width, (5, 5), (2, 2), (2, 2), bias=False)),
            _block(nn.Conv2d(width, 2 * width, 3, (2, 2), 1, bias=False)),
            _block(nn.Conv2d(2 * width, 4 * width, 3, (2, 1), 1, bias=False)),
            _block(nn.Conv2d(4 * width, 4 * width, 3, (2, 2), 1, bias=False)),
        )
        flat = 4 * width * features.N_MELS // 16
        self.mix = nn.Sequential(nn.Conv1d(flat, 6 * width, 1), nn.ReLU(), nn.Dropout(0.2))
        self.attention = nn.Conv1d(6 * width, 1, 1)
        self.out = nn.Linear(6 * width, n_families)

    def forward(self, mel: Tensor) -> Tensor:
        hidden = self.mix(self.body(mel[:, None]).flatten(1, 2))  # [B, C, T / 8]
        return self.out((hidden * self.attention(hidden).softmax(-1)).sum(-1))


class KeyNet(nn.Module):
    """Key and mode from pitch-class bands [B, 3, PITCH_BINS, T]: logits [B, 12 tonics, modes].

    Equivariant under transposition: all layers are circular convolutions along pitch, so a shift of the input by a
    semitone (BINS_PER_SEMITONE) shifts the logits' tonic axis by one.
    """

    def __init__(self, n_modes: int, width: int = 32, n_layers: int = 3) -> None:
        super().__init__()
        fold = features.BINS_PER_SEMITONE
        self.stem = _Circular(len(features.PITCH_BANDS), width, 5, stride=fold, time=3, time_stride=2)
        self.relate = nn.ModuleList(_Circular(width, width, 12) for _ in range(n_layers))
        self.follow = nn.ModuleList(
            _block(nn.Conv2d(width, width, (1, 5), padding=(0, 2 * 2**i), dilation=(1, 2**i), bias=False))
            for i in range(n_layers)
        )
        self.drop = nn.Dropout(0.2)
        self.attention = _Circular(width, width, 12, activate=False)
        self.out = _Circular(2 * width, width, 12)
        self.head = nn.Conv2d(width, n_modes, 1)

    def forward(self, bands: Tensor) -> Tensor:
        hidden = self.stem(bands)  # [B, W, 12, T / 2]
        for relate, follow in zip(self.relate, self.follow, strict=True):
            hidden = follow(hidden + relate(hidden)) + hidden
        weights = self.attention(hidden).softmax(-1)
        pooled = torch.cat([(hidden * weights).sum(-1, keepdim=True), hidden.mean(-1, keepdim=True)], 1)
        return self.head(self.out(self.drop(pooled)))[..., 0].transpose(1, 2)


class TempoNet(nn.Module):
    """Tempo from the tempogram [B, 2 N, tempi]: logits [B, G] over the G tempi of the grid within the range.

    Along log tempo, halves, thirds and doubles of a tempo are at fixed distances; `prior` is a learned bias per tempo.
    """

    def __init__(self, width: int = 40, n_layers: int = 6) -> None:
        super().__init__()
        channels, self.grid = 2 * len(features.ONSET_BANDS), features.tempi()
        self.first = int((self.grid < BPM_LOW).sum())
        self.last = int((self.grid <= BPM_HIGH).sum())
        self.stem = _block(nn.Conv1d(channels, width, 5, padding=2, bias=False))
        self.layers = nn.ModuleList(
            _block(nn.Conv1d(width, width, 5, padding=2 * 2**i, dilation=2**i, bias=False)) for i in range(n_layers)
        )
        self.drop = nn.Dropout(0.1)
        self.out = nn.Conv1d(width, 1, 1)
        self.prior = nn.Parameter(torch.zeros(self.last - self.first))

    @property
    def bpm(self) -> Tensor:
        """The tempo of each logit in beats per minute: [G]."""
        return self.grid[self.first : self.last]

    def forward(self, gram: Tensor) -> Tensor:
        hidden = self.stem(gram)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.out(self.drop(hidden))[:, 0, self.first : self.last] + self.prior


def _block(convolution: nn.Conv1d | nn.Conv2d) -> nn.Sequential:
    norm = nn.BatchNorm1d if isinstance(convolution, nn.Conv1d) else nn.BatchNorm2d
    return nn.Sequential(convolution, norm(convolution.out_channels), nn.ReLU())


class _Circular(nn.Module):
    """A convolution that is circular along the pitch axis: [B, C, P, T] -> [B, C', P / stride, T / time_stride]."""

    def __init__(
        self,
        channels: int,
        out: int,
        size: int,
        stride: int = 1,
        time: int = 1,
        time_stride: int = 1,
        activate: bool = True,
    ) -> None:
        super().__init__()
        # The first output is centred on bin stride // 2, the middle of the first pitch class.
        self.before = (size - 1) // 2 - stride // 2
        self.after = size - 1 - (size - 1) // 2 - (stride - 1 - stride // 2)
        strides, padding = (stride, time_stride), (0, time // 2)
        self.convolution = nn.Conv2d(channels, out, (size, time), strides, padding, bias=not activate)
        self.finish = nn.Sequential(nn.BatchNorm2d(out), nn.ReLU()) if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, x.shape[2] - self.before :], x, x[:, :, : self.after]], 2)
        return self.finish(self.convolution(x))
