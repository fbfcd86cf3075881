"""What an MP3 file holds, counted frame by frame, and reading it whole.

libsndfile trusts the first frame: it stops at the length stated there, and guesses one from the first frames if none
is stated. Through a pipe it guesses nothing and reads to the end. This module imports no torch.
"""

import contextlib
import functools
import os
import re
import struct
import threading
from dataclasses import dataclass

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version: 1, 2, 2.5
_KBPS = {  # by version 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_HEADER = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]", re.DOTALL)
_OTHERS = (b"RIFF", b"RF64", b"riff", b"FORM", b"fLaC", b"OggS", b".snd", b"dns.", b"caff", b"wvpk", b"MAC ")
_SEARCH = 1 << 16  # bytes before the first frame
_WINDOW = 1 << 20
_MOST = 1 << 22  # frames, and places tried as one: 30 h at 44.1 kHz
_SPARE = 3  # frames by which a stated number may differ from the counted one
_TRIMMED = 2 * 4095 + 529  # samples of delay and padding that a decoder leaves out, at most


@dataclass(frozen=True)
class Frame:
    """The header of a frame: `kind` (version, layer, sample rate in Hz, mono or not) is the same in a whole stream."""

    kind: tuple[int, int, int, bool]
    size: int
    samples: int


@dataclass(frozen=True)
class MpegStream:
    """The frames of a file.

    Attributes:
        samples: of all frames, as stored: with the encoder's delay and padding.
        fault: why a decoder would leave sound out, as "holds ..."; empty if it would not.
    """

    samples: int
    frame_samples: int
    fault: str

    def is_left_out(self, n_read: int) -> bool:
        """Whether `n_read` decoded samples are less than the file holds."""
        return n_read < self.samples - _TRIMMED - _SPARE * self.frame_samples


class Pipe:
    """The bytes of a file from `start` on, through a pipe filled by a thread; `end` is the descriptor to read."""

    def __init__(self, handle: int, start: int) -> None:
        self.end, self._into = os.pipe()
        self._thread = threading.Thread(target=self._fill, args=(handle, start), daemon=True)
        self._thread.start()

    def _fill(self, handle: int, place: int) -> None:
        with contextlib.suppress(BrokenPipeError), open(self._into, "wb") as file:
            while data := os.pread(handle, 1 << 16, place):
                file.write(data)
                place += len(data)

    def close(self) -> None:
        os.close(self.end)
        self._thread.join()


def after_id3(handle: int) -> int:
    """The end of the ID3 tags before the audio. The size of a tag is stored as four times seven bits."""
    place = 0
    while len(head := os.pread(handle, 10, place)) == 10 and head[:3] == b"ID3":
        place += _id3_size(head)
    return place


def states_its_length(handle: int) -> bool:
    """Whether the first frame of an MP3 holds the number of frames."""
    data = os.pread(handle, 256, after_id3(handle))
    frame = _frame(data[:4])
    return frame is not None and bool(_stated(data, frame))


def scan(handle: int) -> MpegStream | None:
    """Count the frames of a file by their headers; None if it is no MPEG audio. The descriptor's position is kept."""
    start = after_id3(handle)
    if os.pread(handle, 4, start) in _OTHERS:
        return None
    data = _Window(handle)
    first_place = _next_stream(data, start, start + _SEARCH)
    if first_place is None:
        return None
    first = _frame(data.read(first_place, 4))
    assert first is not None
    stated = _stated(data.read(first_place, 256), first)
    place, n_frames = first_place, 0
    while len(head := data.read(place, 4)) == 4 and data.tries < _MOST:
        frame = _frame(head)
        if frame is None or frame.kind != first.kind:
            following = _next_stream(data, place, data.size)
            if following is None:
                break
            frame, place = _frame(data.read(following, 4)), following
            assert frame is not None
            if frame.kind != first.kind:
                return MpegStream(0, first.samples, f"holds a second MP3 stream ({_change(first, frame)})")
        if place + frame.size > data.size:
            break
        if n_frames and _has_tag(data.read(place, 40), frame):
            return MpegStream(0, first.samples, "holds a second MP3 stream after the first, as joined files do")
        n_frames, place, data.tries = n_frames + 1, place + frame.size, data.tries + 1
    has_tag = _has_tag(data.read(first_place, 40), first)
    fault = ""
    if data.tries >= _MOST:
        fault = "holds more MPEG frames than can be counted"
    elif stated and n_frames - has_tag > stated + _SPARE:
        fault = f"holds {n_frames - has_tag} MPEG frames, but states {stated}, where decoders stop"
    return MpegStream((n_frames - has_tag) * first.samples, first.samples, fault)


class _Window:
    """Parts of a file read in large pieces; `tries` counts the work done."""

    def __init__(self, handle: int) -> None:
        self._handle, self._first, self._data = handle, 0, b""
        self.size, self.tries = os.fstat(handle).st_size, 0

    def read(self, place: int, length: int) -> bytes:
        begin = place - self._first
        if begin < 0 or begin + length > len(self._data):
            self._first, self._data, begin = place, os.pread(self._handle, _WINDOW, place), 0
        return self._data[begin : begin + length]


def _next_stream(data: _Window, place: int, end: int) -> int | None:
    """The next place with three frames of one kind in a row, or frames of one kind up to the end of the file."""
    while place < end:
        if data.read(place, 3) == b"ID3" and len(head := data.read(place, 10)) == 10:
            place += _id3_size(head)
            continue
        piece = data.read(place, min(_SEARCH, end - place))
        for match in _HEADER.finditer(piece):
            data.tries += 1
            if data.tries >= _MOST:
                return None
            if _is_stream(data, place + match.start()):
                return place + match.start()
        place += max(1, len(piece) - 2)
    return None


def _is_stream(data: _Window, place: int) -> bool:
    first = None
    for _ in range(3):
        if first and place >= data.size:
            return place == data.size
        frame = _frame(data.read(place, 4))
        if frame is None or (first and frame.kind != first.kind):
            return False
        first, place = first or frame, place + frame.size
    return True


@functools.lru_cache(maxsize=4096)
def _frame(head: bytes) -> Frame | None:
    """A frame header of four bytes; None if it is none, or of free format."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate_index = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate_index == 3:
        return None
    rate = _RATES[version][rate_index]
    bits = 1000 * _KBPS[version == 3, layer][bitrate - 1]
    padding = head[2] >> 1 & 1
    samples = {1: 384, 2: 1152, 3: 1152 if version == 3 else 576}[layer]
    size = 4 * (12 * bits // rate + padding) if layer == 1 else samples // 8 * bits // rate + padding
    return Frame((version, layer, rate, head[3] >> 6 == 3), size, samples)


def _tag_place(frame: Frame) -> int:
    """Where a frame of layer 3 without sound has its Xing or Info tag: after the side information."""
    version, _, _, mono = frame.kind
    return 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))


def _has_tag(data: bytes, frame: Frame) -> bool:
    """Whether a frame, of which the first 40 bytes are given, is a tag of Xing, LAME or Fraunhofer and no sound."""
    if frame.kind[1] != 3:
        return False
    place = _tag_place(frame)
    is_xing = data[place : place + 4] in (b"Xing", b"Info") and not any(data[6:place])
    return is_xing or data[36:40] == b"VBRI"


def _stated(data: bytes, frame: Frame) -> int:
    """The number of frames in the tag of Xing or LAME of the first frame; 0 if not stated."""
    place = _tag_place(frame)
    if not _has_tag(data[:40], frame) or data[36:40] == b"VBRI" or len(data) < place + 12:
        return 0
    flags, frames = struct.unpack(">II", data[place + 4 : place + 12])
    return int(frames) if flags & 1 else 0


def _change(first: Frame, other: Frame) -> str:
    if first.kind[2] != other.kind[2]:
        return f"the sample rate changes from {first.kind[2]} to {other.kind[2]} Hz"
    return "the number of channels or the layer changes"


def _id3_size(head: bytes) -> int:
    return 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
