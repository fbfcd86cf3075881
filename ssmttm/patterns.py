"""Interleaving of codebooks: how K parallel code streams become one sequence of K-code positions, and back.

The patterns of MusicGen (arXiv 2306.05284, "codebook interleaving patterns"); with their positions S for T frames:

    delay         T + K - 1  codebook k is k positions late: finer codes of a frame see its coarser ones
    parallel      T          a frame a position: its codes do not see each other
    flatten       K * T      a code a position, frame by frame, coarse to fine: each code sees all before it
    coarse_first  2 * T      codebook 0 of all frames, then the others of all frames, a frame a position

What has no code is filled with the special token; with one codebook the four are the same. A longer piece goes on in
the layout of a shorter one, but not with coarse_first, whose second pass starts at T: a model trained on it is to be
sampled at the T of its training, a piece cannot grow once its finer codes stand, and no frame is whole before then.
Shapes: B batch, K codebooks, T frames, S positions.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """Frame t of codebook k stands at position `offsets[k] + passes[k] * T + stride * t`.

    Attributes:
        offsets: how many positions late each codebook starts.
        passes: how many runs over all T frames each codebook waits for.
        stride: positions from one frame to the next.
    """

    offsets: tuple[int, ...]
    passes: tuple[int, ...]
    stride: int

    @property
    def n_codebooks(self) -> int:
        return len(self.offsets)

    def sequence_length(self, n_frames: int) -> int:
        """S for T frames."""
        return max(self._starts(n_frames)) + self.stride * (n_frames - 1) + 1

    def build(self, codes: Tensor, special_token_id: int) -> Tensor:
        """codes [B, K, T] -> sequence [B, K, S], the special token where no code stands."""
        self._check(codes)
        frames = codes.shape[-1]
        sequence = codes.new_full((*codes.shape[:-1], self.sequence_length(frames)), special_token_id)
        for k, places in enumerate(self._places(frames)):
            sequence[:, k, places] = codes[:, k]
        return sequence

    def revert(self, sequence: Tensor) -> Tensor:
        """sequence [B, K, S] -> codes [B, K, T], the inverse of `build` for every T >= 1; fill is not looked at.

        Raises:
            UserError: no T >= 1 gives a sequence of S positions.
        """
        self._check(sequence)
        length = sequence.shape[-1]
        frames = max(1, bisect_left(range(length + 1), length, key=self.sequence_length))
        if self.sequence_length(frames) != length:
            whole = self.sequence_length(frames)
            raise UserError(f"{length} positions are no whole sequence of this pattern: the next whole one has {whole}")
        return torch.stack([sequence[:, k, places] for k, places in enumerate(self._places(frames))], 1)

    def mask(self, n_frames: int) -> Tensor:
        """[K, S] bool, True where a code stands, False where the special token fills."""
        mask = torch.zeros(self.n_codebooks, self.sequence_length(n_frames), dtype=torch.bool)
        for k, places in enumerate(self._places(n_frames)):
            mask[k, places] = True
        return mask

    def frames(self, n_frames: int) -> Tensor:
        """The newest frame that each position writes, int64 [S]: below 0 before the first, T and more where only codes
        of earlier frames are left to write."""
        frames = torch.full((self.sequence_length(n_frames),), -1)
        for n in sorted(set(self.passes)):
            first = min(start for start, own in zip(self._starts(n_frames), self.passes, strict=True) if own == n)
            frames[first:] = torch.arange(len(frames) - first) // self.stride
        return frames

    def _starts(self, n_frames: int) -> list[int]:
        """The position of each codebook's first frame."""
        return [offset + n * n_frames for offset, n in zip(self.offsets, self.passes, strict=True)]

    def _places(self, n_frames: int) -> list[slice]:
        """The positions of each codebook's frames, in order."""
        return [slice(start, start + self.stride * n_frames, self.stride) for start in self._starts(n_frames)]

    def _check(self, codes: Tensor) -> None:
        if codes.shape[1] != self.n_codebooks:
            raise UserError(f"the codes have {codes.shape[1]} codebooks, the pattern is for {self.n_codebooks}")


PATTERNS = ("delay", "parallel", "flatten", "coarse_first")


def get_pattern(name: str, n_codebooks: int, leading: int = 0) -> Pattern:
    """The pattern called `name` over `n_codebooks` codebooks.

    Args:
        leading: extra positions of special tokens in front; 1 gives the sequence of arXiv 2601.14786's released code,
            whose first column is the special column that a TokenLM is given in front of every pattern anyway.

    Raises:
        UserError: no pattern has that name.
    """
    together, in_turn = (leading,) * n_codebooks, tuple(range(leading, leading + n_codebooks))
    one_pass, fine_later = (0,) * n_codebooks, tuple(min(k, 1) for k in range(n_codebooks))
    match name:
        case "delay":
            return Pattern(in_turn, one_pass, stride=1)
        case "parallel":
            return Pattern(together, one_pass, stride=1)
        case "flatten":
            return Pattern(in_turn, one_pass, stride=n_codebooks)
        case "coarse_first":
            return Pattern(together, fine_later, stride=1)
    raise UserError(f"unknown pattern {name!r}: choose from {', '.join(PATTERNS)}")
