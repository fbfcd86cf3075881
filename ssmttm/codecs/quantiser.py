"""Factorised residual vector quantiser (DAC, arXiv 2306.06546, section 3.2) that re-seeds unused codes."""

from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ssmttm.codecs.base import nearest


class ResidualQuantiser(nn.Module):
    """K codebooks of V entries in a projected space, with cosine look-up, each quantising the residual of the former.

    The codebooks learn from the codebook loss alone (no moving averages) and are seeded from the first training batch;
    `restart_unused` re-seeds unused entries. `usage` and `seeded` are buffers, so a run resumes exactly. Quantiser
    dropout masks codebooks, so every parameter gets a gradient in every step and DistributedDataParallel needs no
    `find_unused_parameters`.

    `dropout` is the fraction of training items that keep only a random number of codebooks. `gradient` is how gradients
    pass the look-up: "straight_through", or "rotation" (`rotate_to`). Shapes: D input width, c codebook width.
    """

    usage: Tensor
    seeded: Tensor

    def __init__(
        self,
        width: int,
        n_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        dropout: float,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        self.project_in = nn.ModuleList(nn.Linear(width, codebook_dim) for _ in range(n_codebooks))
        self.project_out = nn.ModuleList(nn.Linear(codebook_dim, width) for _ in range(n_codebooks))
        self.codebooks = nn.Parameter(torch.randn(n_codebooks, codebook_size, codebook_dim))
        self.dropout, self.gradient = dropout, gradient
        self.register_buffer("usage", torch.zeros(n_codebooks, codebook_size, dtype=torch.int64))
        self.register_buffer("seeded", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """z [B, T, D] -> quantised z with straight-through gradients, codes int64 [B, K, T], and the losses `codebook`
        and `commitment` (mean over codebooks)."""
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
            passed = rotate_to(e, q.detach()) if self.gradient == "rotation" else e + (q - e).detach()
            out = self.project_out[k](passed)  # [B, T, D]
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
    def restart_unused(self, z: Tensor, min_usage: float = 0.05) -> Tensor:
        """Re-seed entries used less than `min_usage` of the mean since the last call, and reset the counts.

        They become random inputs of their codebook for z [B, T, D]. Returns the re-seeded entries, bool [K, V].
        """
        unused = unused_entries(self.usage, min_usage)  # [K, V]
        self._reseed(z, unused)
        self.usage.zero_()
        return unused

    @torch.no_grad()
    def fit(self, z: Tensor, levels: range, rounds: int = 6) -> None:
        """Fit some codebooks to z [B, T, D], each to what the fitted ones before it leave.

        The projections are the principal axes of that residual, the entries its clusters by `rounds` of k-means. Uses
        torch's global generator.
        """
        residual = z.flatten(0, 1)  # [n, D]
        for k in levels:
            mean, axes, _ = principal_axes(residual, self.codebooks.shape[2])  # axes [c, D]
            project_in, project_out = cast(nn.Linear, self.project_in[k]), cast(nn.Linear, self.project_out[k])
            project_in.weight.copy_(axes)
            project_in.bias.copy_(-axes @ mean)
            project_out.weight.copy_(axes.T)
            project_out.bias.copy_(mean)
            e = self.project_in[k](residual)  # [n, c]
            reseed(self.codebooks[k], torch.ones_like(self.usage[k], dtype=torch.bool), e)
            for _ in range(rounds):
                index = nearest(e, self.codebooks[k], "cosine")
                sums = torch.zeros_like(self.codebooks[k]).index_add_(0, index, e)
                counts = torch.bincount(index, minlength=len(sums))[:, None]
                self.codebooks[k] = torch.where(counts > 0, sums / counts.clamp_min(1), self.codebooks[k])
            index = nearest(self.project_in[k](residual), self.codebooks[k], "cosine")
            residual = residual - self.project_out[k](self.codebooks[k][index])
        self.seeded.fill_(True)

    @torch.no_grad()
    def copy_from(self, other: "ResidualQuantiser", levels: range, width: int) -> None:
        """Replace these codebooks by the first ones of another quantiser, of inputs of `width`. They read and write the
        first `width` channels."""
        for n, k in enumerate(levels):
            self.codebooks[k] = other.codebooks[n]
            project_in, project_out = cast(nn.Linear, self.project_in[k]), cast(nn.Linear, self.project_out[k])
            their_in, their_out = cast(nn.Linear, other.project_in[n]), cast(nn.Linear, other.project_out[n])
            for ours, theirs in (
                (project_in.weight.T, their_in.weight.T),
                (project_out.weight, their_out.weight),
                (project_out.bias, their_out.bias),
            ):
                ours[:width] = theirs
                ours[width:] = 0
            project_in.bias.copy_(their_in.bias)

    @torch.no_grad()
    def _seed(self, z: Tensor) -> None:
        self._reseed(z, torch.ones_like(self.usage, dtype=torch.bool))
        self.seeded.fill_(True)

    def _reseed(self, z: Tensor, entries: Tensor) -> None:
        residual = z
        for k, rows in enumerate(entries):
            e = self.project_in[k](residual)
            reseed(self.codebooks[k], rows, e.flatten(0, 1))
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


def principal_axes(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], the `count` directions of largest variance [count, D] and their variances [count] of vectors [n, D]."""
    mean = x.mean(dim=0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
    return mean, vectors.T.flip(0)[:count], values.flip(0)[:count]


def rotate_to(e: Tensor, q: Tensor) -> Tensor:
    """q [..., c] as a rotation and scaling of e [..., c] that counts as constant in the gradient ("rotation trick",
    arXiv 2410.06424): the gradient to e keeps its angle to the vector, which straight-through estimation does not."""
    source, target = F.normalize(e.detach(), dim=-1), F.normalize(q, dim=-1)
    middle = F.normalize(source + target, dim=-1)
    scale = q.norm(dim=-1, keepdim=True) / e.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    reflected = e - 2 * (e * middle).sum(-1, keepdim=True) * middle
    return scale * (reflected + 2 * (e * source).sum(-1, keepdim=True) * target)


def unused_entries(usage: Tensor, min_usage: float) -> Tensor:
    """Entries used less than `min_usage` of their codebook's mean; `usage` [K, V] is summed over ranks in place."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(usage)
    return usage < min_usage * usage.float().mean(dim=1, keepdim=True).clamp_min(1e-6)


def reseed(book: Tensor, rows: Tensor, pool: Tensor) -> None:
    """Replace rows (bool [V]) of a codebook [V, c] in place by random vectors of the pool [n, c] plus noise.

    Call it without gradients. Uses torch's global generator; under torch.distributed all ranks get rank 0's codebook.
    """
    vectors = pool[torch.randint(len(pool), (int(rows.sum()),), device=pool.device)]
    book[rows] = vectors + 0.02 * vectors.abs().mean() * torch.randn_like(vectors)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(book, src=0)
