"""Codebook interleaving patterns (MusicGen, arXiv 2306.05284): codes [B, K, T] <-> a sequence of positions [B, K, S].

    delay         T + K - 1  codebook k is delayed by k positions: finer codes depend on the coarser ones of their frame
    parallel      T          one frame per position: the codes of a frame are independent of each other
    flatten       K * T      one code per position, frame by frame, coarse to fine: each code depends on all before it
    coarse_first  2 * T      codebook 0 of all frames, then the other codebooks of all frames, one frame per position

Entries without a code hold the special token; with one codebook the four patterns are equal. A longer clip extends the
layout of a shorter one, except with coarse_first, whose second pass starts at T: sample at the T of training; a clip
cannot be extended, and no frame is complete before the second pass.
Shapes: B batch, K codebooks, T frames, S positions.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """Frame t of codebook k is at position `offsets[k] + passes[k] * T + stride * t`."""

    offsets: tuple[int, ...]  # delay of each codebook in positions
    passes: tuple[int, ...]  # passes over all T frames before each codebook starts
    stride: int  # positions between frames

    @property
    def n_codebooks(self) -> int:
        return len(self.offsets)

    def sequence_length(self, n_frames: int) -> int:
        """S for T frames."""
        return max(self.starts(n_frames)) + self.stride * (n_frames - 1) + 1

    def build(self, codes: Tensor, special_token_id: int) -> Tensor:
        """codes [B, K, T] -> sequence [B, K, S], with the special token where there is no code."""
        self._check(codes)
        frames = codes.shape[-1]
        sequence = codes.new_full((*codes.shape[:-1], self.sequence_length(frames)), special_token_id)
        for k, positions in enumerate(self._positions(frames)):
            sequence[:, k, positions] = codes[:, k]
        return sequence

    def revert(self, sequence: Tensor) -> Tensor:
        """sequence [B, K, S] -> codes [B, K, T], the inverse of `build` for every T >= 1; padding is ignored.

        Raises:
            UserError: S is not the length of a sequence of T >= 1 frames.
        """
        self._check(sequence)
        length = sequence.shape[-1]
        frames = max(1, bisect_left(range(length + 1), length, key=self.sequence_length))
        if self.sequence_length(frames) != length:
            raise UserError(
                f"a sequence of {length} positions does not fit this pattern: the next valid length is "
                f"{self.sequence_length(frames)}"
            )
        return torch.stack([sequence[:, k, positions] for k, positions in enumerate(self._positions(frames))], 1)

    def mask(self, n_frames: int) -> Tensor:
        """[K, S] bool, True at codes, False at padding."""
        mask = torch.zeros(self.n_codebooks, self.sequence_length(n_frames), dtype=torch.bool)
        for k, positions in enumerate(self._positions(n_frames)):
            mask[k, positions] = True
        return mask

    def frames(self, n_frames: int) -> Tensor:
        """The newest frame with a code at each position, int64 [S]; negative before the first frame, T or more where
        only codes of earlier frames remain."""
        return self.newest_frames(torch.arange(self.sequence_length(n_frames)), n_frames)

    def newest_frames(self, positions: Tensor, n_frames: int | None) -> Tensor:
        """`frames` at some positions, int64 [n] -> [n]; `n_frames` None: of a clip without an end."""
        starts, frames = self.starts(n_frames), torch.full_like(positions, -1)
        for n in sorted(set(self.passes)):
            first = min(start for start, own in zip(starts, self.passes, strict=True) if own == n)
            frames = torch.where(positions >= first, (positions - first) // self.stride, frames)
        return frames

    def code_frames(self, positions: Tensor, n_frames: int | None) -> Tensor:
        """The frame of each codebook's code at some positions, int64 [n] -> [n, K]; -1 at padding. `n_frames` None: of
        a clip without an end."""
        offsets = positions[:, None] - torch.tensor(self.starts(n_frames))  # [n, K]
        frames = offsets // self.stride
        valid = (offsets >= 0) & (offsets % self.stride == 0)
        if n_frames is not None:
            valid &= frames < n_frames
        return frames.where(valid, -1)

    def n_complete(self, n_positions: int, n_frames: int | None) -> int:
        """The number of leading frames all of whose codes are within the first positions."""
        n = max(0, (n_positions - 1 - max(self.starts(n_frames))) // self.stride + 1)
        return n if n_frames is None else min(n, n_frames)

    def starts(self, n_frames: int | None) -> list[int]:
        """The position of each codebook's first frame. Raises UserError without T if there are several passes over the
        frames."""
        if n_frames is None:
            self.check_one_pass("a clip without an end")
            return list(self.offsets)
        return [offset + n * n_frames for offset, n in zip(self.offsets, self.passes, strict=True)]

    def check_one_pass(self, what: str) -> None:
        """Raises UserError, naming what cannot be done, if there are several passes over the frames."""
        if any(self.passes):
            raise UserError(f"{what} needs a pattern of one pass over the frames: delay, parallel or flatten")

    def _positions(self, n_frames: int) -> list[slice]:
        """The positions of each codebook's frames."""
        return [slice(start, start + self.stride * n_frames, self.stride) for start in self.starts(n_frames)]

    def _check(self, codes: Tensor) -> None:
        if codes.shape[1] != self.n_codebooks:
            raise UserError(f"the codes have {codes.shape[1]} codebooks, the pattern is for {self.n_codebooks}")


PATTERNS = ("delay", "parallel", "flatten", "coarse_first")


def get_pattern(name: str, n_codebooks: int, leading: int = 0) -> Pattern:
    """The pattern called `name` over `n_codebooks` codebooks.

    Args:
        leading: extra positions of special tokens at the start; 1 gives the sequence of arXiv 2601.14786's released
            code, whose first column is the start column that precedes every pattern in a TokenLM.

    Raises:
        UserError: unknown name.
    """
    aligned, delayed = (leading,) * n_codebooks, tuple(range(leading, leading + n_codebooks))
    one_pass, two_passes = (0,) * n_codebooks, tuple(min(k, 1) for k in range(n_codebooks))
    match name:
        case "delay":
            return Pattern(delayed, one_pass, stride=1)
        case "parallel":
            return Pattern(aligned, one_pass, stride=1)
        case "flatten":
            return Pattern(delayed, one_pass, stride=n_codebooks)
        case "coarse_first":
            return Pattern(aligned, two_passes, stride=1)
    raise UserError(f"unknown pattern {name!r}: choose from {', '.join(PATTERNS)}")
