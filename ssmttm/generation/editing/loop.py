"""A clip that repeats without a seam: its last frames are generated again with the first ones as what follows them, and
it is decoded as a circle.

Shapes: T frames, C channels, S samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmttm.codecs import Autoencoder
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes

REGION_SECONDS = 2.0  # at the end of the clip, generated again
MIN_SECONDS = 2 * REGION_SECONDS
_MIX_SECONDS = 0.03


def check_loop(durations: Sequence[float | None], has_clip: bool) -> None:
    """Raises UserError if clips cannot be loops."""
    for duration in durations:
        if duration is None or has_clip:
            raise UserError("a loop begins and ends: give it a duration, and no clip to continue")
        if duration < MIN_SECONDS:
            found = f"got {duration:g} s: give more seconds or bars"
            raise UserError(f"a loop must be of at least {MIN_SECONDS:g} s, {found}")


def unrolled(codes: ClipCodes, frame_rate: float) -> tuple[ClipCodes, tuple[int, int]]:
    """Codes of T frames followed by themselves, and the frames (start, stop) to generate again."""
    n_frames = codes.n_frames
    return ClipCodes.cat([codes, codes]), (n_frames - round(REGION_SECONDS * frame_rate), n_frames)


@torch.inference_mode()
def decode_loop(decoder: Autoencoder, frames: Tensor, n_samples: int) -> Tensor:
    """Decode frames [1, ..., T] as a circle: [C, S], whose end leads into its start. If S is no whole number of frames,
    the last samples are mixed with those before the circle's start."""
    n_frames, hop = frames.shape[-1], decoder.hop_length
    n_mixed = round(_MIX_SECONDS * decoder.sample_rate)
    before, after = decoder.context or (n_frames, n_frames)
    before, after = min(before, n_frames), min(after + 1 + n_mixed // hop, n_frames)
    around = torch.cat([frames[..., n_frames - before :], frames, frames[..., :after]], -1)
    wav = decoder.decode(around)[0].float().cpu()
    circle = wav[:, before * hop : (before + n_frames) * hop].clone()  # [C, T * hop]
    fade_in = torch.linspace(0, 1, n_mixed)
    # A codec may depend on the position in the clip: the start then differs a little from what follows the end.
    end = (before + n_frames) * hop
    circle[:, :n_mixed] = torch.lerp(wav[:, end : end + n_mixed], circle[:, :n_mixed], fade_in)
    cut = circle[:, :n_samples].clone()
    if n_samples < circle.shape[-1]:
        cut[:, -n_mixed:] = torch.lerp(cut[:, -n_mixed:], circle[:, -n_mixed:], fade_in)
    return cut
