"""What the detectors hear: log-mel, a log-frequency spectrum folded to pitch classes, onset strength and its tempogram.

Pure functions of mono audio [B, S] at `SAMPLE_RATE`. Level does not matter after `level`, which brings each row to one
loudness. Sources: the log-frequency filter bank and pitch-class profiles follow Müller, Fundamentals of Music
Processing (2015), chapter 3; the tempograms chapter 6 (Grosche and Müller, Extracting Predominant Local Pulse
Information from Music Recordings, 2011).
"""

from functools import lru_cache

import torch
from torch import Tensor

SAMPLE_RATE = 24_000

MELS = 64
MEL_RATE = 50  # frames a second
_MEL_FFT, _MEL_LOW, _MEL_HIGH = 1024, 40.0, 11_000.0

BINS_PER_SEMITONE = 3
PITCH_BINS = 12 * BINS_PER_SEMITONE
PITCH_RATE = 10  # frames a second
_LOWEST_NOTE, _HIGHEST_NOTE = 28, 100  # MIDI E1 to E7: the log-frequency spectrum's range
_DECIMATE = 4  # the notes lie below 2.7 kHz
_REACH, _TOGETHER = 8, 16  # decimated samples that the low-pass reaches to each side; that are computed together
_SPLIT_NOTE, _LONG_FFT, _SHORT_FFT = 57, 4_096, 2_048  # below the split a window of 0.68 s, above it of 0.34 s
PITCH_BANDS = ((28, 50), (46, 74), (70, 100))  # bass, middle, treble: overlapping so that no note falls between

ONSET_RATE = 100  # frames a second
ONSET_BANDS = ((40.0, 160.0), (160.0, 640.0), (640.0, 2560.0), (2560.0, 11_000.0))  # Hz
_ONSET_FFT = 512

TEMPI_PER_OCTAVE = 40
LOWEST_TEMPO, TEMPO_OCTAVES = 15.0, 5  # bpm: 15 to 480, so that bars and subdivisions are seen beside the beat


def level(wav: Tensor) -> Tensor:
    """Bring each row to a root mean square of 0.1; silence stays silence. wav [B, S] -> [B, S]."""
    return wav * (0.1 / wav.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-5))


def log_mel(wav: Tensor) -> Tensor:
    """Log-mel power, about -1 to 2 for levelled audio. wav [B, S] -> [B, MELS, T] at MEL_RATE."""
    power = _magnitude(wav, _MEL_FFT, SAMPLE_RATE // MEL_RATE).square()
    return (_mel_bank(MELS, _MEL_FFT, _MEL_LOW, _MEL_HIGH) @ power + 1e-4).log10() / 2 + 1


def log_frequency_spectrum(wav: Tensor) -> Tensor:
    """A compressed magnitude spectrum, BINS_PER_SEMITONE bins a semitone from MIDI note 28 to 100 (A4 = 440 Hz).

    The middle bin of each triple lies on the note itself. wav [B, S] -> [B, bins, T] at PITCH_RATE.
    """
    hop = SAMPLE_RATE // PITCH_RATE // _DECIMATE
    wav = _decimated(wav)
    low, high = _note_bank(_LOWEST_NOTE, _SPLIT_NOTE, _LONG_FFT), _note_bank(_SPLIT_NOTE, _HIGHEST_NOTE, _SHORT_FFT)
    low = low @ _magnitude(wav, _LONG_FFT, hop)[:, : low.shape[1]]
    high = high @ _magnitude(wav, _SHORT_FFT, hop)[:, : high.shape[1]]
    return torch.log1p(torch.cat([low, high], 1))


def pitch_class_bands(spectrum: Tensor) -> Tensor:
    """Fold a log-frequency spectrum to pitch classes, bass, middle and treble apart.

    spectrum [B, bins, T] -> [B, len(PITCH_BANDS), PITCH_BINS, T]; bin 3c + 1 is the centre of pitch class c (C = 0), so
    a transposition by a semitone is a circular shift by BINS_PER_SEMITONE.
    """
    bands = []
    for low, high in PITCH_BANDS:
        first, last = ((note - _LOWEST_NOTE) * BINS_PER_SEMITONE for note in (low, high))
        part = spectrum[:, first:last]
        folded = part.new_zeros(len(part), PITCH_BINS, part.shape[-1])
        classes = (torch.arange(first, last, device=part.device) + _LOWEST_NOTE % 12 * BINS_PER_SEMITONE) % PITCH_BINS
        bands.append(folded.index_add(1, classes, part) * (12 / (high - low)))
    return torch.stack(bands, 1)


def chroma(wav: Tensor) -> Tensor:
    """Share of each pitch class (C = 0), all bands together; a frame sums to 1, or 0 in silence.

    wav [B, S] -> [B, 12, T] at PITCH_RATE.
    """
    folded = pitch_class_bands(log_frequency_spectrum(level(wav))).sum(1)  # [B, 36, T]
    classes = folded.unflatten(1, (12, BINS_PER_SEMITONE)).sum(2)
    return classes / classes.sum(1, keepdim=True).clamp_min(1e-6)


def onset_strength(wav: Tensor) -> Tensor:
    """Rise of log energy within each of ONSET_BANDS. wav [B, S] -> [B, bands, T] at ONSET_RATE, >= 0."""
    power = _magnitude(wav, _ONSET_FFT, SAMPLE_RATE // ONSET_RATE).square()
    mel = torch.log1p(100 * (_mel_bank(40, _ONSET_FFT, ONSET_BANDS[0][0], ONSET_BANDS[-1][1]) @ power))
    rise = torch.nn.functional.pad(mel[..., 1:] - mel[..., :-1], (1, 0)).clamp_min(0)
    centres = _mel_centres(40, ONSET_BANDS[0][0], ONSET_BANDS[-1][1])
    inside = [[float(low <= hertz < high) for hertz in centres] for low, high in ONSET_BANDS]
    weights = torch.tensor(inside, device=wav.device)
    return (weights / weights.sum(1, keepdim=True)) @ rise


def tempi() -> Tensor:
    """The tempo grid in beats per minute, logarithmic. [TEMPO_OCTAVES * TEMPI_PER_OCTAVE]."""
    steps = torch.arange(TEMPO_OCTAVES * TEMPI_PER_OCTAVE)
    return LOWEST_TEMPO * 2 ** (steps / TEMPI_PER_OCTAVE)


def tempogram(onsets: Tensor) -> Tensor:
    """How strongly the onsets repeat at each tempo: autocorrelation, then Fourier magnitude, per band.

    onsets [B, N, T] at ONSET_RATE -> [B, 2N, tempi]; autocorrelation within -1 to 1, Fourier within 0 to about 1.
    """
    length = onsets.shape[-1]
    centred = onsets - onsets.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * length)
    correlation = torch.fft.irfft(spectrum.abs().square(), 2 * length)[..., :length]
    overlap = torch.arange(length, 0, -1, device=onsets.device) / length
    correlation = correlation / overlap.clamp_min(0.2) / correlation[..., :1].clamp_min(1e-6)
    grid = tempi().to(onsets)
    lags = (60 * ONSET_RATE / grid).clamp_max(length - 2)
    left = lags.long()
    share = lags - left
    autocorrelation = correlation[..., left] * (1 - share) + correlation[..., left + 1] * share
    window = torch.hann_window(length, periodic=False, device=onsets.device)
    phase = 2 * torch.pi * torch.outer(torch.arange(length, device=onsets.device) / ONSET_RATE, grid / 60)
    waves = torch.stack([phase.cos(), phase.sin()])  # [2, T, tempi]
    tapered = centred * window
    fourier = torch.einsum("bnt,ctg->cbng", tapered, waves).square().sum(0).sqrt()
    energy = tapered.square().sum(-1, keepdim=True) * window.square().sum()
    return torch.cat([autocorrelation, 3 * fourier / energy.clamp_min(1e-6).sqrt()], 1)


def _magnitude(wav: Tensor, n_fft: int, hop: int) -> Tensor:
    """Magnitude of a centred Hann STFT, a full-scale sine giving about 0.5. [B, S] -> [B, n_fft // 2 + 1, S // hop]."""
    window = torch.hann_window(n_fft, device=wav.device)
    mode = "reflect" if wav.shape[-1] > n_fft // 2 else "constant"
    spectrum = torch.stft(wav, n_fft, hop, window=window / window.sum(), pad_mode=mode, return_complex=True)
    return spectrum[..., : max(1, wav.shape[-1] // hop)].abs()


def _mel_centres(n_mels: int, low: float, high: float) -> list[float]:
    """Centre frequencies in Hz, evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    edges = 2595 * torch.log10(1 + torch.tensor([low, high]) / 700)
    return (700 * (10 ** (torch.linspace(edges[0], edges[1], n_mels + 2) / 2595) - 1))[1:-1].tolist()


@lru_cache(maxsize=8)
def _mel_bank(n_mels: int, n_fft: int, low: float, high: float) -> Tensor:
    """Triangular mel filters of unit peak, scaled so that a sine's power counts about 100 fold. [n_mels, bins]."""
    points = torch.tensor([low, *_mel_centres(n_mels, low, high), high])
    hertz = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    width = max(1.0, SAMPLE_RATE / n_fft)  # no filter narrower than the transform's own resolution
    rise = (hertz - points[:-2, None]) / (points[1:-1] - points[:-2])[:, None].clamp_min(width)
    fall = (points[2:, None] - hertz) / (points[2:] - points[1:-1])[:, None].clamp_min(width)
    return 100 * torch.minimum(rise, fall).clamp_min(0)


@lru_cache(maxsize=8)
def _note_bank(first: int, last: int, n_fft: int) -> Tensor:
    """Gaussian filters on a log-frequency axis, three a semitone, for MIDI notes first (in) to last (out).

    [bins, F], F the transform's bins up to a little above the last note.
    """
    notes = first + (torch.arange((last - first) * BINS_PER_SEMITONE) - 1) / BINS_PER_SEMITONE
    centre = 440 * 2 ** ((notes - 69) / 12)
    resolution = SAMPLE_RATE / _DECIMATE / n_fft
    hertz = torch.arange(int(1.05 * centre[-1].item() / resolution) + 8) * resolution
    spread = (centre * (2 ** (1 / 36) - 1) * 0.6).clamp_min(0.45 * resolution)  # standard deviation in Hz
    return 200 * torch.exp(-0.5 * ((hertz - centre[:, None]) / spread[:, None]).square())


def _decimated(wav: Tensor) -> Tensor:
    """Every _DECIMATE-th sample of low-passed audio. [B, S] -> [B, ceil(S / _DECIMATE)]."""
    bank, length = _low_pass_bank().to(wav.device), -(-wav.shape[-1] // _DECIMATE)
    padded = torch.nn.functional.pad(wav, (_REACH * _DECIMATE, bank.shape[1]))[:, None]
    together = torch.nn.functional.conv1d(padded, bank[:, None], stride=_TOGETHER * _DECIMATE)  # [B, _TOGETHER, T]
    return together.transpose(1, 2).flatten(1)[:, :length]


@lru_cache(maxsize=1)
def _low_pass_bank() -> Tensor:
    """A low-pass, once for each of _TOGETHER output samples in a row: many filters at once are the quicker convolution.

    A Hann-windowed sinc that passes up to 0.95 of the decimated Nyquist frequency, unit gain. [_TOGETHER, taps].
    """
    n = torch.arange(-_REACH * _DECIMATE, _REACH * _DECIMATE + 1)
    taps = torch.sinc(0.95 * n / _DECIMATE) * torch.hann_window(len(n), periodic=False)
    padded = torch.nn.functional.pad(taps / taps.sum(), (0, (_TOGETHER - 1) * _DECIMATE))
    return torch.stack([padded.roll(_DECIMATE * i) for i in range(_TOGETHER)])
