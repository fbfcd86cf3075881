"""Rendering: each track on a fresh synthesiser, a mix with the lead clearly louder than the rest, a room, a mix bus."""

import importlib.util
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.builtin.composition.score import Piece, Track
from data_prep.builtin.reverb import reverberate
from ssmttm.errors import UserError

_BLOCK = 64  # samples: events are placed on this grid (2.7 ms at 24 kHz), the synthesiser's own
_TARGET_RMS = 0.11
_LEAD_OVER_REST = 7.0  # dB between the lead and the whole accompaniment
_KNEE, _PEAK = 0.5, 0.89  # of full scale
_FADE = 0.35  # seconds
_RIDE, _RIDE_SECONDS = 5.0, 0.6  # dB that the accompaniment is raised where the lead rests, and how slowly
_SENDS = {"lead": 0.8, "counter": 1.0, "chords": 1.0, "second": 1.2, "pad": 1.3, "bass": 0.15, "drums": 0.45}
_PLACES = {  # in stereo, from -1 (left) to 1 (right)
    "lead": 0.15, "counter": -0.6, "chords": 0.7, "second": -0.8, "pad": 0.5, "bass": 0.0, "drums": -0.15,
}  # fmt: skip
_RATIO, _THRESHOLD = 1.6, 1.0  # of the bus compressor; the threshold in RMS of the piece


@cache
def _soundfont() -> bytes:
    """The General MIDI soundfont TimGM6mb that the package pretty_midi carries."""
    spec = importlib.util.find_spec("pretty_midi")
    if spec is None or spec.origin is None:
        raise UserError(
            "the soundfont is missing: the package pretty_midi is not installed; run `pip install pretty_midi`"
        )
    path = Path(spec.origin).parent / "TimGM6mb.sf2"
    if not path.is_file():
        raise UserError(f"the soundfont is missing: {path} does not exist; reinstall pretty_midi")
    return path.read_bytes()


def _render_track(track: Track, piece: Piece, sample_rate: int) -> np.ndarray:
    """One track alone -> float32 [S]. A synthesiser of its own, so that no state is left from another piece."""
    try:
        import tinysoundfont
    except ImportError as error:
        raise UserError("tinysoundfont is not installed; run `pip install --no-deps tinysoundfont`") from error
    total = round(piece.duration * sample_rate)
    synth = tinysoundfont.Synth(samplerate=sample_rate)
    font = synth.sfload(_soundfont())
    drums = track.role == "drums"
    synth.program_select(0, font, 128 if drums else 0, track.program, drums)
    events: list[tuple[int, int, int, int]] = []  # block, 0 off / 1 on, pitch, velocity
    for note in track.notes:
        first = round(piece.onset(note) * sample_rate / _BLOCK)
        stop = max(first + 1, round(piece.release(note) * sample_rate / _BLOCK))
        events += [(first, 1, note.pitch, note.velocity), (stop, 0, note.pitch, 0)]
    audio = np.zeros((total, 2), np.float32)
    view, at = memoryview(audio).cast("B"), 0
    for block, kind, pitch, velocity in sorted(events):
        sample = min(block * _BLOCK, total)
        if sample > at:
            synth.generate_simple(sample - at, view[8 * at : 8 * sample])
            at = sample
        if kind:
            synth.noteon(0, pitch, velocity)
        else:
            synth.noteoff(0, pitch)
    if at < total:
        synth.generate_simple(total - at, view[8 * at :])
    return audio.mean(axis=1)


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def _loudness(audio: np.ndarray, sample_rate: int) -> float:
    """RMS of the sounding part: the 0.1 s frames within 30 dB of the loudest."""
    frame = sample_rate // 10
    power = np.square(audio[: len(audio) // frame * frame].reshape(-1, frame)).mean(axis=1, dtype=np.float64)
    sounding = power[power > 1e-3 * power.max()] if power.size else power
    return float(np.sqrt(sounding.mean())) if sounding.size else 0.0


def ride(lead: np.ndarray, sample_rate: int) -> np.ndarray:
    """The gain of the accompaniment [S]: raised where the lead is silent, as an engineer rides a fader."""
    frame = sample_rate // 10
    padded = np.pad(np.square(lead, dtype=np.float64), (0, -len(lead) % frame))
    power = padded.reshape(-1, frame).mean(axis=1)
    resting = (power < 0.003 * _loudness(lead, sample_rate) ** 2).astype(np.float64)
    window = np.hanning(round(_RIDE_SECONDS * 20) + 3)
    width = len(window) // 2
    smooth = np.convolve(np.pad(resting, width, mode="edge"), window / window.sum(), "valid")
    at = np.interp(np.arange(len(lead)), (np.arange(len(smooth)) + 0.5) * frame, smooth)
    return (10 ** (_RIDE / 20 * at)).astype(np.float32)


def swell(piece: Piece, sample_rate: int) -> np.ndarray:
    """The gain of the whole piece [S]: it moves from bar to bar, within half a second around the bar lines."""
    times, levels = [0.0], [piece.swell[0]]
    for bar, (before, after) in enumerate(pairwise(piece.swell), 1):
        line = piece.seconds(bar * piece.metre.bar)
        times += [line - 0.4, line + 0.05]
        levels += [before, after]
    at = np.arange(round(piece.duration * sample_rate)) / sample_rate
    return (10 ** (np.interp(at, times, levels) / 20)).astype(np.float32)


def compress(mix: np.ndarray, sample_rate: int) -> np.ndarray:
    """A gentle compressor of [C, S] or [S]: passages louder than the piece on average come out up to a third quieter.

    The level is that of 0.2 s around each moment; the gain changes smoothly.
    """
    frame, n_samples = sample_rate // 10, mix.shape[-1]
    padded = np.pad(np.square(np.atleast_2d(mix), dtype=np.float64).mean(axis=0), (0, -n_samples % frame))
    power = padded.reshape(-1, frame).mean(axis=1)
    level = np.sqrt(np.convolve(np.pad(power, 1, mode="edge"), (0.25, 0.5, 0.25), "valid")) / max(_rms(mix), 1e-9)
    gain = np.maximum(level / _THRESHOLD, 1.0) ** (1 / _RATIO - 1)
    return mix * np.interp(np.arange(n_samples), (np.arange(len(gain)) + 0.5) * frame, gain).astype(np.float32)


def _limit(mix: np.ndarray) -> np.ndarray:
    """Scale to the target loudness; peaks bend above half of full scale and stay below 0.89."""
    mix = mix * np.float32(_TARGET_RMS / max(_rms(mix), 1e-9))
    over = np.abs(mix) > _KNEE
    room = _PEAK - _KNEE
    mix[over] = np.sign(mix[over]) * (_KNEE + room * np.tanh((np.abs(mix[over]) - _KNEE) / room))
    return mix


def render(piece: Piece, sample_rate: int = 24_000) -> np.ndarray:
    """The piece as mono audio: float32 [duration * sample_rate], faded at the end, peak at most 0.89.

    Raises UserError where the synthesiser or its soundfont is not installed.
    """
    return _mix(piece, sample_rate, 1)[0]


def render_stereo(piece: Piece, sample_rate: int = 24_000) -> np.ndarray:
    """The piece as `render` has it, with panned instruments and a room of two channels: float32 [2, S]."""
    return _mix(piece, sample_rate, 2)


def _gains(track: Track, piece: Piece, channels: int) -> np.ndarray:
    """Gains of a track [C, 1]; two have the same energy at any place, and pieces are mirrored by turns."""
    if channels == 1:
        return np.ones((1, 1), np.float32)
    place = _PLACES[track.role] * (1 if piece.id[-1] in "02468" else -1)
    angle = (1 + place) * np.pi / 4
    return np.sqrt(2) * np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)


def _mix(piece: Piece, sample_rate: int, channels: int) -> np.ndarray:
    """[C, S]."""
    shape = channels, round(piece.duration * sample_rate)
    lead, rest, lead_send, rest_send = (np.zeros(shape, np.float32) for _ in range(4))
    for track in piece.tracks:
        audio = _render_track(track, piece, sample_rate)
        audio *= np.float32(10 ** (track.level / 20) / max(_loudness(audio, sample_rate), 1e-9))
        placed = audio * _gains(track, piece, channels)
        leads = track.role == "lead"
        (lead if leads else rest)[:] += placed
        (lead_send if leads else rest_send)[:] += placed * np.float32(_SENDS[track.role])
    raised = ride(lead.mean(axis=0), sample_rate)
    balance = raised * np.float32(_rms(lead) / max(_rms(rest), 1e-9) * 10 ** (-_LEAD_OVER_REST / 20))
    wet = np.float32(10 ** (piece.room.wet / 20))
    mix = lead + rest * balance
    sent = (lead_send + rest_send * balance).mean(axis=0)
    for channel, direct in enumerate(mix):
        direct += wet * reverberate(sent, piece.room.name, sample_rate, right=channel == 1)
    fade = round(_FADE * sample_rate)
    mix[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return _limit(compress(mix, sample_rate) * swell(piece, sample_rate))
