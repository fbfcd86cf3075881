"""Factorised residual vector quantiser (DAC, arXiv 2306.06546, section 3.2), with no dead codes."""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ssmttm.codecs.base import nearest


class ResidualQuantiser(nn.Module):
    """K codebooks of V entries in a narrow space, looked up by cosine, each on what the ones before it left over.

    The codebooks learn from the codebook loss alone (no moving averages). They are seeded from the first training
    batch; entries that go unused are re-seeded by `revive`. `usage` and `seeded` are buffers, so that a resumed run
    goes on exactly. Every parameter gets a gradient (perhaps zero) in every training step: a codebook that quantiser
    dropout skips is masked, not left out, so DistributedDataParallel needs no `find_unused_parameters`.

    Args:
        width: D of what is quantised.
        n_codebooks: K.
        codebook_size: V.
        codebook_dim: c, the width in which entries are looked up.
        dropout: share of training items that keep only a random number of codebooks.
    """

    usage: Tensor
    seeded: Tensor

    def __init__(self, width: int, n_codebooks: int, codebook_size: int, codebook_dim: int, dropout: float) -> None:
        super().__init__()
        self.project_in = nn.ModuleList(nn.Linear(width, codebook_dim) for _ in range(n_codebooks))
        self.project_out = nn.ModuleList(nn.Linear(codebook_dim, width) for _ in range(n_codebooks))
        self.codebooks = nn.Parameter(torch.randn(n_codebooks, codebook_size, codebook_dim))
        self.dropout = dropout
        self.register_buffer("usage", torch.zeros(n_codebooks, codebook_size, dtype=torch.int64))
        self.register_buffer("seeded", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantise, with straight-through gradients.

        Args:
            z: [B, T, D].

        Returns:
            The quantised z [B, T, D], codes int64 [B, K, T], losses `codebook` and `commitment` (mean over codebooks).
        """
        if self.training and not self.seeded:
            self._seed(z)
        active = self._active(z)  # [K, B]
        residual, total, codes = z, torch.zeros_like(z), []
        losses = {"codebook": z.new_zeros(()), "commitment": z.new_zeros(())}
        for k, keep in enumerate(active):
            e = self.project_in[k](residual)  # [B, T, c]
            index = nearest(e.detach(), self.codebooks[k], "cosine")  # [B, T]
            q = F.embedding(index, self.codebooks[k])
            weight = keep / active.numel()
            losses["codebook"] = losses["codebook"] + (weight * (q - e.detach()).square().mean(dim=(1, 2))).sum()
            losses["commitment"] = losses["commitment"] + (weight * (e - q.detach()).square().mean(dim=(1, 2))).sum()
            out = self.project_out[k](e + (q - e).detach())  # [B, T, D]
            total = total + keep[:, None, None] * out
            residual = residual - out
            codes.append(index)
        stacked = torch.stack(codes, dim=1)
        if self.training:
            self._count(stacked)
        return total, stacked, losses

    def encode(self, z: Tensor) -> Tensor:
        """z [B, T, D] -> codes int64 [B, K, T]."""
        residual, codes = z, []
        for k in range(len(self.codebooks)):
            index = nearest(self.project_in[k](residual), self.codebooks[k], "cosine")
            residual = residual - self.project_out[k](self.codebooks[k][index])
            codes.append(index)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> z [B, T, D]."""
        return sum(self.project_out[k](self.codebooks[k][codes[:, k]]) for k in range(codes.shape[1]))

    @torch.no_grad()
    def restart_unused(self, z: Tensor, min_share: float = 0.05) -> Tensor:
        """Re-seed entries that were used less than `min_share` of the mean since the last call; start counting anew.

        Each becomes a vector that its codebook is given for z now.

        Args:
            z: [B, T, D], encoder output of a training batch.

        Returns:
            How many entries were re-seeded, int64 [K].
        """
        dead = unused(self.usage, min_share)  # [K, V]
        self._reseed(z, dead)
        self.usage.zero_()
        return dead.sum(dim=1)

    @torch.no_grad()
    def _seed(self, z: Tensor) -> None:
        self._reseed(z, torch.ones_like(self.usage, dtype=torch.bool))
        self.seeded.fill_(True)

    def _reseed(self, z: Tensor, dead: Tensor) -> None:
        residual = z
        for k, rows in enumerate(dead):
            e = self.project_in[k](residual)
            reseed(self.codebooks.data[k], rows, e.flatten(0, 1))
            index = nearest(e, self.codebooks[k], "cosine")
            residual = residual - self.project_out[k](self.codebooks[k][index])

    def _active(self, z: Tensor) -> Tensor:
        """1 where an item keeps a codebook, else 0: [K, B]."""
        n, batch = len(self.codebooks), len(z)
        if not self.training:
            return z.new_ones(n, batch)
        kept = torch.randint(1, n + 1, (batch,), device=z.device)
        kept = torch.where(torch.rand(batch, device=z.device) < self.dropout, kept, n)
        return (torch.arange(n, device=z.device)[:, None] < kept).float()

    def _count(self, codes: Tensor) -> None:
        for k in range(len(self.codebooks)):
            self.usage[k] += torch.bincount(codes[:, k].flatten(), minlength=self.usage.shape[1])


def unused(usage: Tensor, min_share: float) -> Tensor:
    """Entries used less than `min_share` of their codebook's mean: counts [K, V], summed over ranks here -> bool."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(usage)
    return usage < min_share * usage.float().mean(dim=1, keepdim=True).clamp_min(1e-6)


def reseed(book: Tensor, rows: Tensor, pool: Tensor) -> None:
    """Replace, in place, rows (bool [V]) of a codebook [V, c] by vectors of the pool [n, c] plus a little noise.

    Drawn with torch's global generator; under torch.distributed all ranks take rank 0's codebook.
    """
    drawn = pool[torch.randint(len(pool), (int(rows.sum()),), device=pool.device)]
    book[rows] = drawn + 0.02 * drawn.abs().mean() * torch.randn_like(drawn)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(book, src=0)
