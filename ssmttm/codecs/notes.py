"""Notes in a codec: magnitudes in semitone bands for the encoder, and a decoder head of sinusoids at their frequencies.

An inverse-STFT head has to invent, or to receive in the codes, a phase for each frame that continues the one before it.
Where it fails, partials are modulated at the frame rate and spread over neighbouring notes. The sinusoids here have
phases that run on, so that only amplitudes are coded and learnt, as in DDSP (arXiv 2001.04643). Shapes: B items, n
frames, N notes, F bins, D width.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs.spectral import STFT

NOTES = (28, 97)  # MIDI numbers, 41 to 2,093 Hz
FLOOR = 0.1  # of the magnitudes of NoteSpectrum
MAX_LOG_AMPLITUDE = 1.0


def frequencies(sample_rate: int) -> Tensor:
    """The frequencies of NOTES below half the sample rate, for A4 = 440 Hz: float64 [N]."""
    hertz = [440 * 2 ** ((note - 69) / 12) for note in range(*NOTES)]
    return torch.tensor([value for value in hertz if value < sample_rate / 2], dtype=torch.float64, device="cpu")


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def semitone_filterbank(sample_rate: int, n_fft: int, device: torch.device | None = None) -> Tensor:
    """Gaussian filters of unit peak centred on the notes, half a semitone wide or at least half a bin: float32
    [N, F]."""
    centre = frequencies(sample_rate)[:, None]
    resolution = sample_rate / n_fft
    deviation = (centre * (2 ** (1 / 24) - 1)).clamp_min(0.5 * resolution)
    hertz = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=centre.device) * resolution
    return torch.exp(-0.5 * ((hertz - centre) / deviation).square()).float().to(device)


class NoteSpectrum(nn.Module):
    """Log magnitude in each semitone band, one frame per `hop` samples, in a window long enough to separate notes.

    `window`, in samples, is a multiple of 2 * hop.
    """

    bank: Tensor  # [F, N]
    log_level: Tensor  # of a sine of amplitude 1 [N]

    def __init__(self, sample_rate: int, window: int, hop: int) -> None:
        super().__init__()
        self.stft = STFT(window, hop)
        bank = semitone_filterbank(sample_rate, window)
        bins = int(bank.sum(dim=0).nonzero().max()) + 1
        self.register_buffer("bank", bank[:, :bins].T.contiguous(), persistent=False)  # [F, N]
        spacing = frequencies(sample_rate) * (2 ** (1 / 12) - 1)
        overlap = (1.5 * sample_rate / window / spacing).clamp_min(1)  # bands that a tone falls into
        level = torch.full_like(overlap, window / 4 * math.sqrt(1.5))  # of a sine of amplitude 1
        self.register_buffer("log_level", (level * overlap.sqrt()).log().float(), persistent=False)  # [N]

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, n * hop] -> approximate natural logs of the amplitudes of sines at the notes [B, n, N]."""
        spectrum = self.stft(wav)[..., : len(self.bank)]
        power = torch.view_as_real(spectrum).square().sum(-1) @ self.bank  # [B, n, N]
        return 0.5 * power.clamp_min(FLOOR**2).log() - self.log_level


class OscillatorHead(nn.Module):
    """Sinusoids at the frequencies of the notes, with one amplitude per `hop` samples; Hann windows of two hops
    cross-fade from frame to frame.

    The log amplitudes are read from the latents of notes, of width `note_width`, one per two frames, and corrected by
    the decoder's features. The output depends on the position of its first frame in the stream, by the phases only.
    """

    cycles: Tensor  # per hop [N], float64
    offsets: Tensor  # phase at the first sample of frame 0 in cycles [N], float64
    basis: Tensor  # windowed cosines and sines of two hops [2N, 2 hop]

    def __init__(self, width: int, note_width: int, sample_rate: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        hertz = frequencies(sample_rate)
        self.read = nn.Linear(note_width, 2 * len(hertz))
        self.norm = nn.LayerNorm(width)
        self.correct = nn.Linear(width, len(hertz))
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)
        nn.init.constant_(self.read.bias, -6.0)  # nearly silent
        samples = torch.arange(2 * hop, dtype=torch.float64, device=hertz.device)
        angles = 2 * math.pi * (hertz / sample_rate)[:, None] * samples
        window = torch.hann_window(2 * hop, dtype=torch.float64, device=hertz.device)
        self.register_buffer("cycles", hertz * hop / sample_rate, persistent=False)
        offsets = torch.arange(len(hertz), dtype=torch.float64, device=hertz.device) * 0.618034 % 1
        self.register_buffer("offsets", offsets, persistent=False)
        basis = torch.cat([angles.cos() * window, angles.sin() * window]).float()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, notes: Tensor, x: Tensor, first: int = 0) -> Tensor:
        """Latents of notes [B, n / 2, note_width] and features [B, n, D] -> wav [B, n * hop]; frame 0 is frame `first`
        of the stream."""
        log_amplitude = self.read(notes).unflatten(-1, (2, -1)).flatten(1, 2)  # [B, n, N]
        return self.synthesise((log_amplitude + self.correct(self.norm(x))).float(), first)

    def synthesise(self, log_amplitude: Tensor, first: int = 0) -> Tensor:
        """Natural logs of amplitudes [B, n, N] -> wav [B, n * hop]."""
        amplitude = log_amplitude.clamp(max=MAX_LOG_AMPLITUDE).exp()
        frames = torch.arange(first, first + amplitude.shape[1], device=amplitude.device, dtype=torch.float64)
        phase = 2 * math.pi * ((frames[:, None] * self.cycles + self.offsets) % 1)  # [n, N], in double precision
        parts = torch.cat([amplitude * phase.cos().float(), -amplitude * phase.sin().float()], dim=-1)  # [B, n, 2N]
        with torch.autocast(parts.device.type, enabled=False):
            halves = (parts @ self.basis).unflatten(-1, (2, self.hop))  # [B, n, 2, hop]
        left, right = halves.unbind(dim=2)
        joined = F.pad(left, (0, 0, 0, 1)) + F.pad(right, (0, 0, 1, 0))  # [B, n + 1, hop]
        margin = self.hop // 2  # frame n is centred on hop n
        return joined.flatten(1)[:, margin : margin + left.shape[1] * self.hop]
