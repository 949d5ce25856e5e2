"""How the chunked scan cuts its rows into slabs, and the products on them (see model.ssd_core).

A slab is (n, H, R Q, P): n chunks of Q steps with R ranks, heads before time, so that each product
is one batched GEMM. What heads share (B, C, their product) has no head axis. Ranks come before
steps, so that a factor per step is a repeated tile with a long inner axis. G = B K is the number of
chunks of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_LIMIT = 64.0
_SLAB = 2**18  # numbers of a slab's mixing matrices: what stays in a core's cache


def power(exponent: Tensor, mask: Tensor | None) -> Tensor:
    """mask o 2^exponent, in place."""
    exponent.clamp_(-_LIMIT, _LIMIT).exp2_()
    return exponent if mask is None else exponent.mul_(mask)


def _pad_steps(value: Tensor, steps: int) -> Tensor:
    """value (B, T, ...) -> (B, steps, ...)."""
    missing = steps - value.shape[1]
    if not missing:
        return value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], 1)


class Cut(NamedTuple):
    """How rows of `length` steps are cut: B rows of K chunks of Q steps."""

    rows: int
    chunks: int
    size: int
    length: int

    def steps(self, value: Tensor) -> Tensor:
        """(B, T, ...) -> (G, Q, ...), a view where no chunk is short."""
        padded = _pad_steps(value, self.chunks * self.size)
        return padded.reshape(-1, self.size, *value.shape[2:])

    def heads(self, value: Tensor) -> Tensor:
        """(B, T, H) -> (G, H, Q), a fresh contiguous tensor."""
        return self.steps(value).transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def joined(self, value: Tensor) -> Tensor:
        """(G, Q, ...) -> (B, T, ...), a view."""
        return value.view(self.rows, -1, *value.shape[2:])[:, : self.length]

    def by_row(self, value: Tensor) -> Tensor:
        """(G, H, ...) -> (B, H, K, ...), a view."""
        return value.view(self.rows, self.chunks, *value.shape[1:]).transpose(1, 2)

    def by_chunk(self, value: Tensor) -> Tensor:
        """(B, H, K, ...) -> (G, H, ...)."""
        return value.transpose(1, 2).flatten(0, 1)

    def mask(self, value: Tensor | None) -> Tensor | None:
        """A mask of ScanMasks, (B, 1, K, ...) -> (G, 1, ...); one of (Q, Q) serves all chunks."""
        return value if value is None or value.dim() == 2 else self.by_chunk(value)

    def slabs(self, heads: int, rank: int) -> Iterator[tuple[slice, list[slice]]]:
        """Chunks, and the parts of their heads: each with at most _SLAB pairs, or of one head."""
        pairs = (rank * self.size) ** 2
        count = max(1, _SLAB // (pairs * heads))
        part = min(heads, max(1, _SLAB // pairs))
        parts = [slice(first, min(first + part, heads)) for first in range(0, heads, part)]
        groups = self.rows * self.chunks
        for first in range(0, groups, count):
            yield slice(first, min(first + count, groups)), parts


def ranked(value: Tensor, heads: slice, rank_in: Tensor | None) -> Tensor:
    """x (n, Q, H, P) of some heads, times their rank_in (H, R, P): (n, h, R Q, P), contiguous."""
    value = value[:, :, heads].transpose(1, 2)
    if rank_in is None:
        return value.contiguous()
    return (value.unsqueeze(2) * rank_in[heads, :, None]).flatten(2, 3)


def rank_first(value: Tensor, heads: slice) -> Tensor:
    """(n, Q, H, R, P) of some heads -> (n, h, R Q, P), contiguous."""
    value = value[:, :, heads].permute(0, 2, 3, 1, 4)
    return value.reshape(*value.shape[:2], -1, value.shape[-1])


def shared(value: Tensor) -> Tensor:
    """b or c (n, Q, R, N) -> (n, R Q, N), contiguous."""
    return value.transpose(1, 2).reshape(len(value), -1, value.shape[-1])


def unshared(value: Tensor, rank: int) -> Tensor:
    """Inverse of `shared`, a view."""
    return value.unflatten(1, (rank, -1)).transpose(1, 2)


def tile(factor: Tensor, rank: int) -> Tensor:
    """(..., Q) -> (..., R Q, 1): one factor per step, for all its ranks."""
    if rank > 1:
        factor = factor.repeat(*[1] * (factor.dim() - 1), rank)
    return factor.unsqueeze(-1)


def scale_pairs(value: Tensor, weights: Tensor, rank: int, *, out: Tensor | None = None) -> Tensor:
    """value (n, h or 1, R Q, R Q) o weights (n, h, Q, Q), repeated for all pairs of ranks."""
    if rank == 1:
        return torch.mul(value, weights, out=out)
    size = weights.shape[-1]
    tiles = (rank, size, rank, size)
    result = weights.new_empty(*weights.shape[:2], rank * size, rank * size) if out is None else out
    torch.mul(
        value.view(*value.shape[:2], *tiles),
        weights[..., None, :, None, :],
        out=result.view(*result.shape[:2], *tiles),
    )
    return result


def weigh(
    cum: Tensor, source: Tensor, gamma: Tensor, pair: Tensor | None, place: tuple[slice, slice]
) -> Tensor:
    """W (n, h, Q, Q) of some chunks and heads; cum, source and gamma (G, H, Q)."""
    exponents = cum[place].unsqueeze(-1) - source[place].unsqueeze(-2)
    if pair is not None and pair.dim() > 2:
        pair = pair[place[0]]
    weights = power(exponents, pair)
    weights.diagonal(dim1=-2, dim2=-1).copy_(gamma[place])
    return weights


def mix(scores: Tensor, weights: Tensor, skip: Tensor, rank: int) -> Tensor:
    """M = W o G + skip I, (n, h, RQ, RQ)."""
    mixing = scale_pairs(scores, weights, rank)
    mixing.diagonal(dim1=-2, dim2=-1).add_(skip.view(-1, 1))
    return mixing


def products(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Batched matrix product over all leading dimensions (equal on both sides).

    `out`, contiguous, is overwritten: fresh pages cost a third of a small product's time.
    """
    shape = (*left.shape[:-2], left.shape[-2], right.shape[-1])
    left, right = left.flatten(0, -3), right.flatten(0, -3)
    if out is None:
        return torch.bmm(left, right).view(shape)
    torch.bmm(left, right, out=out.view(-1, *shape[-2:]))
    return out


def add_products(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, in place; total must be contiguous."""
    total.view(-1, *total.shape[-2:]).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return total
