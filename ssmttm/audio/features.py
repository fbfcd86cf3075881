"""Audio features: mel filter banks, chroma, log-frequency spectra, onsets and tempograms.

Functions with a `sample_rate` argument work at any rate. The others are the inputs of the trained networks and of the
music metrics; they take mono audio [B, S] at `SAMPLE_RATE`. Sources: log-frequency filter bank and pitch classes:
Müller, Fundamentals of Music Processing (2015), chapter 3; tempograms: chapter 6 (Grosche and Müller, Extracting
Predominant Local Pulse Information from Music Recordings, 2011).

Shapes: B clips, S samples, T frames, F = n_fft / 2 + 1 frequencies.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

VERSION = "1"  # raise with every change of the features that the trained networks take
SAMPLE_RATE = 24_000

N_MELS = 64
MEL_RATE = 50  # frames a second
_MEL_FFT, _MEL_RANGE = 1024, (40.0, 11_000.0)

BINS_PER_SEMITONE = 3
PITCH_BINS = 12 * BINS_PER_SEMITONE
PITCH_RATE = 10  # frames a second
_LOWEST_NOTE, _HIGHEST_NOTE = 28, 100  # MIDI E1 to E7: the range of the log-frequency spectrum
_DECIMATE = 4  # the notes lie below 2.7 kHz
_REACH, _PARALLEL = 8, 16  # decimated samples: half the length of the low-pass; computed per convolution step
_SPLIT_NOTE, _LONG_FFT, _SHORT_FFT = 57, 4_096, 2_048  # a window of 0.68 s below the split, of 0.34 s above
PITCH_BANDS = ((28, 50), (46, 74), (70, 100))  # bass, middle, treble, overlapping so that every note is in one

ONSET_RATE = 100  # frames a second
ONSET_BANDS = ((40.0, 160.0), (160.0, 640.0), (640.0, 2560.0), (2560.0, 11_000.0))  # Hz
_ONSET_FFT, _ONSET_MELS, _ONSET_RANGE = 512, 40, (40.0, 11_000.0)

TEMPI_PER_OCTAVE = 40
LOWEST_TEMPO, TEMPO_OCTAVES = 15.0, 5  # 15 to 480 bpm, to include bars and subdivisions of the beat


# --- spectra ---------------------------------------------------------------------------------------------------------


def rms_normalise(wav: Tensor) -> Tensor:
    """Scale each row to a root mean square of 0.1; silence stays silent. [B, S] -> [B, S]."""
    return wav * (0.1 / wav.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-5))


def stft_magnitude(
    wav: Tensor, n_fft: int, hop: int | None = None, floor: float = 0.0, unit_window: bool = False
) -> Tensor:
    """Magnitude of a centred STFT with a Hann window: [B, S] -> [B, F, S // hop + 1].

    The hop is by default n_fft / 4. A `floor` above 0 keeps the gradient finite in silence. `unit_window` scales the
    window to a sum of 1, so that a full-scale sine gives about 0.5.
    """
    window = _hann(n_fft, wav.device)
    window = window / window.sum() if unit_window else window
    pad_mode = "reflect" if wav.shape[-1] > n_fft // 2 else "constant"
    spectrum = torch.stft(wav, n_fft, hop or n_fft // 4, window=window, pad_mode=pad_mode, return_complex=True)
    if floor == 0:
        return spectrum.abs()
    return (spectrum.real.square() + spectrum.imag.square()).clamp_min(floor**2).sqrt()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def mel_filterbank(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    *,
    scale: Literal["slaney", "htk"] = "slaney",
    norm: Literal["slaney"] | None = "slaney",
    triangles: Literal["hz", "mel"] = "hz",
    min_width: float = 0.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Tensor:
    """Triangular mel filters, float32 [n_mels, F].

    Args:
        f_min, f_max: Hz; default of f_max: half the sample rate.
        scale: mel scale of Slaney's Auditory Toolbox (1998), or of HTK.
        norm: "slaney" for unit area; None for unit peak.
        triangles: the axis on which the slopes are linear.
        min_width: smallest width of a slope in Hz.
        dtype: precision of the computation.
    """
    f_max = f_max or sample_rate / 2
    low, high = _hz_to_mel(torch.tensor([f_min, f_max], dtype=dtype), scale)
    edges = _mel_to_hz(torch.linspace(low, high, n_mels + 2, dtype=dtype), scale)  # [n_mels + 2]
    edges[0], edges[-1] = f_min, f_max
    area = 2 / (edges[2:] - edges[:-2])
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=dtype)
    if triangles == "mel":
        edges, frequencies = _hz_to_mel(edges, scale), _hz_to_mel(frequencies, scale)
    width = edges.diff().clamp_min(min_width)[:, None]
    rising = (frequencies - edges[:-2, None]) / width[:-1]
    falling = (edges[2:, None] - frequencies) / width[1:]
    filters = torch.minimum(rising, falling).clamp_min(0)
    return (filters * area[:, None] if norm else filters).float().to(device)


_BREAK_MEL, _LOG_STEP = 15.0, math.log(6.4) / 27  # Slaney's scale: linear below 1 kHz, logarithmic above


def _hz_to_mel(hz: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)
    return torch.where(hz < 1000, hz * 3 / 200, _BREAK_MEL + (hz.clamp_min(1) / 1000).log() / _LOG_STEP)


def _mel_to_hz(mel: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return torch.where(mel < _BREAK_MEL, mel * 200 / 3, 1000 * ((mel - _BREAK_MEL) * _LOG_STEP).exp())


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def _hann(n_fft: int, device: torch.device) -> Tensor:
    return torch.hann_window(n_fft, device=device)


def log_mel(wav: Tensor) -> Tensor:
    """Log-mel power, about -1 to 2 for RMS-normalised audio. [B, S] -> [B, N_MELS, T] at MEL_RATE."""
    return (_mel_power(wav, N_MELS, _MEL_FFT, MEL_RATE, _MEL_RANGE) + 1e-4).log10() / 2 + 1


def _mel_power(wav: Tensor, n_mels: int, n_fft: int, rate: int, hz: tuple[float, float]) -> Tensor:
    """Mel power spectrum in which the power of a sine counts about 100 fold. [B, S] -> [B, n_mels, T] at `rate`."""
    resolution = max(1.0, SAMPLE_RATE / n_fft)
    bank = mel_filterbank(
        SAMPLE_RATE, n_fft, n_mels, *hz, scale="htk", norm=None, min_width=resolution, dtype=torch.float32
    )
    return (100 * bank).to(wav.device) @ _frames(wav, n_fft, SAMPLE_RATE // rate).square()


def _frames(wav: Tensor, n_fft: int, hop: int) -> Tensor:
    """Magnitudes without the frame beyond the end: [B, S] -> [B, F, S // hop]."""
    return stft_magnitude(wav, n_fft, hop, unit_window=True)[..., : max(1, wav.shape[-1] // hop)]


# --- pitch -----------------------------------------------------------------------------------------------------------


def chroma_stft(wav: Tensor, sample_rate: int, n_fft: int = 2048) -> Tensor:
    """Energy by pitch class, scaled to a maximum of 1 in each frame: [B, S] -> [B, 12, T] (C first).

    Equal to librosa's chroma_stft with tuning 0 (Ellis 2007, chroma feature analysis), except for the first and last
    frames.
    """
    power = stft_magnitude(wav, n_fft, floor=1e-5).square()
    energy = chroma_filterbank(sample_rate, n_fft).to(wav.device) @ power
    return energy / energy.amax(dim=1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)


def frame_chroma(wav: Tensor, sample_rate: int, n_frames: int) -> Tensor:
    """`chroma_stft` at the frame rate of a codec, for melody conditioning: [B, S] -> [B, 12, n_frames], 0 to 1."""
    n_fft, length = 2048, wav.shape[-1]
    chroma = chroma_stft(F.pad(wav, (0, max(0, n_fft - length))), sample_rate, n_fft)  # at least one window
    return F.adaptive_avg_pool1d(chroma[..., : length // (n_fft // 4) + 1], n_frames)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def chroma_filterbank(sample_rate: int, n_fft: int) -> Tensor:
    """Gaussian pitch-class filters, weighted towards the octaves around C5 (librosa.filters.chroma with tuning 0).

    Returns:
        float32 [12, F].
    """
    frequencies = torch.arange(1, n_fft, dtype=torch.float64) * sample_rate / n_fft
    bins = 12 * (frequencies * 16 / 440).log2()  # semitones above A0
    bins = torch.cat([bins[:1] - 18, bins])  # [n_fft]
    width = torch.cat([bins.diff().clamp_min(1), bins.new_ones(1)])
    distance = (bins - torch.arange(12.0, dtype=torch.float64)[:, None] + 6 + 120) % 12 - 6  # [12, n_fft]
    weights = torch.exp(-0.5 * (2 * distance / width) ** 2)
    weights = F.normalize(weights, dim=0) * torch.exp(-0.5 * ((bins / 12 - 5) / 2) ** 2)
    return weights.roll(-3, dims=0)[:, : n_fft // 2 + 1].float()


def log_frequency_spectrum(wav: Tensor) -> Tensor:
    """Compressed magnitudes, BINS_PER_SEMITONE bins a semitone from MIDI note 28 to 100 (A4 = 440 Hz).

    The middle bin of each semitone is centred on the note. [B, S] -> [B, bins, T] at PITCH_RATE.
    """
    hop = SAMPLE_RATE // PITCH_RATE // _DECIMATE
    wav = _decimate(wav)
    low, high = _note_bank(_LOWEST_NOTE, _SPLIT_NOTE, _LONG_FFT), _note_bank(_SPLIT_NOTE, _HIGHEST_NOTE, _SHORT_FFT)
    low = low @ _frames(wav, _LONG_FFT, hop)[:, : low.shape[1]]
    high = high @ _frames(wav, _SHORT_FFT, hop)[:, : high.shape[1]]
    return torch.log1p(torch.cat([low, high], 1))


def pitch_class_bands(spectrum: Tensor) -> Tensor:
    """Fold a log-frequency spectrum to pitch classes, separately for bass, middle and treble.

    spectrum [B, bins, T] -> [B, len(PITCH_BANDS), PITCH_BINS, T]. Bin 3c + 1 is the centre of pitch class c (C = 0), so
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


def chroma_log_frequency(wav: Tensor) -> Tensor:
    """Chroma for key estimation: resolves bass notes, which `chroma_stft` cannot.

    [B, S] -> [B, 12, T] at PITCH_RATE; a frame sums to 1, or to 0 in silence.
    """
    folded = pitch_class_bands(log_frequency_spectrum(rms_normalise(wav))).sum(1)  # [B, 36, T]
    classes = folded.unflatten(1, (12, BINS_PER_SEMITONE)).sum(2)
    return classes / classes.sum(1, keepdim=True).clamp_min(1e-6)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def _note_bank(first: int, last: int, n_fft: int) -> Tensor:
    """Gaussian filters on a log-frequency axis, three a semitone, for MIDI notes `first` to `last` (excluded).

    [bins, f], f the STFT's bins up to slightly above the last note.
    """
    notes = first + (torch.arange((last - first) * BINS_PER_SEMITONE) - 1) / BINS_PER_SEMITONE
    centre = 440 * 2 ** ((notes - 69) / 12)
    resolution = SAMPLE_RATE / _DECIMATE / n_fft
    hertz = torch.arange(int(1.05 * centre[-1].item() / resolution) + 8) * resolution
    deviation = (centre * (2 ** (1 / 36) - 1) * 0.6).clamp_min(0.45 * resolution)  # Hz
    return 200 * torch.exp(-0.5 * ((hertz - centre[:, None]) / deviation[:, None]).square())


def _decimate(wav: Tensor) -> Tensor:
    """Every _DECIMATE-th sample of low-passed audio. [B, S] -> [B, ceil(S / _DECIMATE)]."""
    bank, length = _low_pass_bank().to(wav.device), -(-wav.shape[-1] // _DECIMATE)
    padded = F.pad(wav, (_REACH * _DECIMATE, bank.shape[1]))[:, None]
    filtered = F.conv1d(padded, bank[:, None], stride=_PARALLEL * _DECIMATE)  # [B, _PARALLEL, T]
    return filtered.transpose(1, 2).flatten(1)[:, :length]


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # a cached tensor may be used in training later
def _low_pass_bank() -> Tensor:
    """The low-pass filter, shifted for each of _PARALLEL consecutive outputs: several filters at once are faster.

    A Hann-windowed sinc that passes up to 0.95 of the decimated Nyquist frequency, unit gain. [_PARALLEL, taps].
    """
    n = torch.arange(-_REACH * _DECIMATE, _REACH * _DECIMATE + 1)
    taps = torch.sinc(0.95 * n / _DECIMATE) * torch.hann_window(len(n), periodic=False)
    padded = F.pad(taps / taps.sum(), (0, (_PARALLEL - 1) * _DECIMATE))
    return torch.stack([padded.roll(_DECIMATE * i) for i in range(_PARALLEL)])


# --- onsets and tempo ------------------------------------------------------------------------------------------------


def spectral_flux(log_spectrum: Tensor) -> Tensor:
    """Rise from each frame to the next: [..., T] -> [..., T - 1], >= 0."""
    return log_spectrum.diff(dim=-1).clamp_min(0)


def onset_strength(wav: Tensor) -> Tensor:
    """Spectral flux of the log energy within each of ONSET_BANDS. [B, S] -> [B, bands, T] at ONSET_RATE, >= 0."""
    mel = torch.log1p(100 * _mel_power(wav, _ONSET_MELS, _ONSET_FFT, ONSET_RATE, _ONSET_RANGE))
    flux = F.pad(spectral_flux(mel), (1, 0))
    low, high = _hz_to_mel(torch.tensor(_ONSET_RANGE), "htk")
    centres = _mel_to_hz(torch.linspace(low, high, _ONSET_MELS + 2), "htk")[1:-1].tolist()
    inside = [[float(low <= hertz < high) for hertz in centres] for low, high in ONSET_BANDS]
    weights = torch.tensor(inside, device=wav.device)
    return (weights / weights.sum(1, keepdim=True)) @ flux


def pick_peaks(curve: Tensor, reach: int, threshold: Tensor | float) -> Tensor:
    """Where [B, T] is the maximum within `reach` frames to each side and above the threshold: bool [B, T]."""
    highest = F.max_pool1d(curve[:, None], 2 * reach + 1, 1, reach)[:, 0]
    return (curve == highest) & (curve > threshold)


def onset_times(wav: Tensor, sample_rate: int) -> list[Tensor]:
    """Onsets as peaks of the spectral flux (Dixon, DAFx 2006): [B, S] -> B tensors of seconds, ascending."""
    n_fft = 1024
    bank = mel_filterbank(sample_rate, n_fft, 64, device=wav.device)
    log_mels = (bank @ stft_magnitude(wav, n_fft, floor=1e-5)).clamp_min(1e-5).log10()
    flux = spectral_flux(log_mels.clamp_min(-3)).mean(dim=1)  # [B, T - 1]
    step = n_fft / 4 / sample_rate
    near, far = max(1, round(0.03 / step)), max(1, round(0.1 / step))
    mean = F.avg_pool1d(flux[:, None], 2 * far + 1, 1, far)[:, 0]
    peaks = pick_peaks(flux, near, mean + 0.05)
    return [(row.nonzero()[:, 0] + 1) * step for row in peaks]


def autocorrelation(x: Tensor) -> Tensor:
    """Autocorrelation of [..., T] after removal of its mean, at lags 0 to T - 1."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x - x.mean(-1, keepdim=True), 2 * length)
    return torch.fft.irfft(spectrum.abs().square(), 2 * length)[..., :length]


def tempi() -> Tensor:
    """The tempo grid in beats per minute, logarithmic. [TEMPO_OCTAVES * TEMPI_PER_OCTAVE]."""
    steps = torch.arange(TEMPO_OCTAVES * TEMPI_PER_OCTAVE)
    return LOWEST_TEMPO * 2 ** (steps / TEMPI_PER_OCTAVE)


def tempogram(onsets: Tensor) -> Tensor:
    """Periodicity of the onsets at each tempo, per band: autocorrelation tempogram, then Fourier tempogram.

    onsets [B, N, T] at ONSET_RATE -> [B, 2N, tempi]; autocorrelation within -1 to 1, Fourier magnitude 0 to about 1.
    """
    length = onsets.shape[-1]
    correlation = autocorrelation(onsets)
    overlap = torch.arange(length, 0, -1, device=onsets.device) / length
    correlation = correlation / overlap.clamp_min(0.2) / correlation[..., :1].clamp_min(1e-6)
    grid = tempi().to(onsets)
    lags = (60 * ONSET_RATE / grid).clamp_max(length - 2)
    left = lags.long()
    fraction = lags - left
    at_tempi = correlation[..., left] * (1 - fraction) + correlation[..., left + 1] * fraction
    window = torch.hann_window(length, periodic=False, device=onsets.device)
    phase = 2 * torch.pi * torch.outer(torch.arange(length, device=onsets.device) / ONSET_RATE, grid / 60)
    waves = torch.stack([phase.cos(), phase.sin()])  # [2, T, tempi]
    tapered = (onsets - onsets.mean(-1, keepdim=True)) * window
    fourier = torch.einsum("bnt,ctg->cbng", tapered, waves).square().sum(0).sqrt()
    energy = tapered.square().sum(-1, keepdim=True) * window.square().sum()
    return torch.cat([at_tempi, 3 * fourier / energy.clamp_min(1e-6).sqrt()], 1)
