"""Interleaving of codebooks: how K parallel code streams become one sequence of K-code positions, and back.

"parallel": position s holds frame s of every codebook. "delay" (MusicGen, arXiv 2306.05284): codebook k is k positions
late, so that finer codes of a frame see its coarser ones; what has no code is filled with the special token.
Shapes: B batch, K codebooks, T frames, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """Codebook k stands `offsets[k]` positions late; S = T + max(offsets)."""

    offsets: tuple[int, ...]

    @property
    def n_codebooks(self) -> int:
        return len(self.offsets)

    def sequence_length(self, n_frames: int) -> int:
        """S for T frames."""
        return n_frames + max(self.offsets)

    def build(self, codes: Tensor, special_token_id: int) -> Tensor:
        """codes [B, K, T] -> sequence [B, K, S], the special token where no code stands."""
        self._check(codes)
        frames = codes.shape[-1]
        sequence = codes.new_full((*codes.shape[:-1], self.sequence_length(frames)), special_token_id)
        for k, offset in enumerate(self.offsets):
            sequence[:, k, offset : offset + frames] = codes[:, k]
        return sequence

    def revert(self, sequence: Tensor) -> Tensor:
        """sequence [B, K, S] -> codes [B, K, T], every frame whose codes are all there; the inverse of `build`."""
        self._check(sequence)
        frames = sequence.shape[-1] - max(self.offsets)
        if frames < 0:
            length, least = sequence.shape[-1], max(self.offsets)
            raise UserError(f"{length} positions are no whole sequence of this pattern: it has {least} or more")
        return torch.stack([sequence[:, k, offset : offset + frames] for k, offset in enumerate(self.offsets)], 1)

    def mask(self, n_frames: int) -> Tensor:
        """[K, S] bool, True where a code stands, False where the special token fills."""
        index = torch.arange(self.sequence_length(n_frames)) - torch.tensor(self.offsets)[:, None]
        return (index >= 0) & (index < n_frames)

    def _check(self, codes: Tensor) -> None:
        if codes.shape[1] != self.n_codebooks:
            raise UserError(f"the codes have {codes.shape[1]} codebooks, the pattern is for {self.n_codebooks}")


PATTERNS = ("delay", "parallel")


def get_pattern(name: str, n_codebooks: int, leading: int = 0) -> Pattern:
    """The pattern called `name` over `n_codebooks` codebooks.

    Args:
        leading: extra positions of special tokens in front; 1 gives the sequence of arXiv 2601.14786's released code.

    Raises:
        UserError: no pattern has that name.
    """
    if name not in PATTERNS:
        raise UserError(f"unknown pattern {name!r}: choose from {', '.join(PATTERNS)}")
    step = 1 if name == "delay" else 0
    return Pattern(tuple(leading + step * k for k in range(n_codebooks)))
