"""Matrix products of the chunked scan with their hand-written gradient.

Autograd of the formulas keeps every (H, Q, Q) and (H, T, N) intermediate and walks each of them
several times; written out, the backward pass keeps two of them and works in place.

Layout: heads before time, (B, H, K, Q R, P) for K chunks of Q steps with R ranks, so that each
product is one batched GEMM over B H K. What heads share (B, C, their product) has no head axis.

With g the gradient of y:  W = exp(cum_t - cum_s + log_w_s) below the diagonal, gamma on it;
G = C B^T;  M = W o G + skip I;  E = exp(cum_end - cum_s + log_w_s);  S = (E o B)^T X;
D = exp(differences of the chunks' totals);  V = D [h0; S] is the state entering each chunk;
F = exp(cum_t);  y = M X + (F o C) V.
    dX = M^T g + (E o B) dS        dM = g X^T       dV = (F o C)^T g    dS = D^T dV
    dG = sum_h dM o W              dC = dG B + sum_h F o (g V^T)
    dB = dG^T C + sum_h E o (X dS^T)
and every exponent's gradient is (gradient of the exponential) o (its value), summed over the axis
where the exponent is constant.

Exponentials are powers of two (three times as fast as exp on CPU) of exponents held in [-64, 64],
then multiplied by a mask of 0 and 1: no infinity reaches the mask, and no subnormal number, which
a CPU multiplies a hundred times slower, reaches a product. Open entries are never positive but for
the step's own weight. Source: Mamba-2 2405.21060, section 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


_LOG2_E = 1.0 / math.log(2.0)
_LIMIT = 64.0


def _power(exponent: Tensor, mask: Tensor | None) -> Tensor:
    """mask o 2^exponent, in place."""
    exponent.clamp_(-_LIMIT, _LIMIT).exp2_()
    return exponent if mask is None else exponent.mul_(mask)


def _pad_steps(value: Tensor, steps: int) -> Tensor:
    """value (B, T, ...) -> (B, steps, ...)."""
    missing = steps - value.shape[1]
    if not missing:
        return value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], 1)


def _head_chunks(value: Tensor, chunks: int, size: int) -> Tensor:
    """(B, T, H) -> (B, H, K, Q), a fresh contiguous tensor."""
    value = _pad_steps(value, chunks * size).transpose(1, 2)
    value = value.clone(memory_format=torch.contiguous_format)
    return value.view(*value.shape[:2], chunks, size)


def _shared_chunks(value: Tensor, chunks: int, size: int) -> Tensor:
    """b or c (B, T, R, N) -> (B, K, Q R, N), contiguous."""
    value = _pad_steps(value, chunks * size).contiguous()
    return value.view(value.shape[0], chunks, size * value.shape[2], value.shape[3])


def _rank_chunks(value: Tensor, rank_in: Tensor | None, chunks: int, size: int) -> Tensor:
    """x (B, T, H, P) or y's gradient (B, T, H, R, P) -> (B, H, K, Q R, P) in one pass."""
    if value.dim() == 4:
        value = value.unsqueeze(3)
    batch, length, heads, rank, width = value.shape
    if rank_in is not None:
        rank = rank_in.shape[1]
    steps = chunks * size
    out = value.new_empty(batch, heads, steps, rank, width)
    if steps > length:
        out[:, :, length:] = 0.0
    target = out[:, :, :length].permute(0, 2, 1, 3, 4)
    if rank_in is None:
        target.copy_(value)
    else:
        torch.mul(value, rank_in, out=target)
    return out.view(batch, heads, chunks, size * rank, width)


def _spread(factor: Tensor, rank: int) -> Tensor:
    """(..., Q) -> (..., Q R, 1): one factor per step, for all its ranks."""
    if rank > 1:
        factor = factor.repeat_interleave(rank, -1)
    return factor.unsqueeze(-1)


def _weighted_scores(weights: Tensor, scores: Tensor, rank: int) -> Tensor:
    """weights (B, H, K, Q, Q) o scores (B, K, Q R, Q R) -> (B, H, K, Q R, Q R)."""
    scores = scores.unsqueeze(1)
    if rank == 1:
        return weights * scores
    size = weights.shape[-1]
    split = scores.view(*scores.shape[:3], size, rank, size, rank)
    product = weights[..., :, None, :, None] * split
    return product.view(*weights.shape[:3], size * rank, size * rank)


def _products(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Batched matrix product over all leading dimensions (equal on both sides).

    `out`, contiguous, is overwritten: fresh pages cost a third of a small product's time.
    """
    shape = (*left.shape[:-2], left.shape[-2], right.shape[-1])
    left, right = left.flatten(0, -3), right.flatten(0, -3)
    if out is None:
        return torch.bmm(left, right).view(shape)
    torch.bmm(left, right, out=out.view(-1, *shape[-2:]))
    return out


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, in place; total must be contiguous."""
    total.view(-1, *total.shape[-2:]).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return total


def _chunk_decays(totals: Tensor, boundary: Tensor) -> Tensor:
    """Decay from each chunk boundary to each later one: totals (B, H, K) -> (B, H, K+1, K+1).

    Running sums over a whole row grow with its length, so their differences are taken in fp64.
    """
    running = torch.nn.functional.pad(totals.double().cumsum(-1), (1, 0))
    gaps = (running.unsqueeze(-1) - running.unsqueeze(-2)).to(totals.dtype)
    return _power(gaps, boundary)


class ChunkedScan(torch.autograd.Function):
    """(x, rank_in, b, c, log_decay, log_weight, gamma, skip, h0, masks) -> y, final h.

    x (B, T, H, P); rank_in (H, R, P) or None; b, c (B, T, R, N), rotated; log_decay, log_weight,
    gamma (B, T, H); skip (H,); h0 (B, H, N, P) or None; masks: ScanMasks.
    y (B, T, H, R, P) is a view of head-major memory; h (B, H, N, P).
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, rank_in, b, c, log_decay, log_weight, gamma, skip, h0, masks = args
        length, rank, size = x.shape[1], b.shape[2], masks.chunk_len
        chunks = -(-length // size)
        inputs = _rank_chunks(x, rank_in, chunks, size)  # (B, H, K, QR, P)
        b_chunks, c_chunks = (_shared_chunks(v, chunks, size) for v in (b, c))
        cum = _head_chunks(log_decay, chunks, size).mul_(_LOG2_E).cumsum(-1)  # (B, H, K, Q)
        source = cum - _head_chunks(log_weight, chunks, size).mul_(_LOG2_E)
        weights = cum.unsqueeze(-1) - source.unsqueeze(-2)  # (B, H, K, Q, Q)
        _power(weights, masks.pair)
        weights.diagonal(dim1=-2, dim2=-1).copy_(_head_chunks(gamma, chunks, size))
        scores = c_chunks @ b_chunks.mT  # (B, K, QR, QR)
        mixing = _weighted_scores(weights, scores, rank)
        mixing.diagonal(dim1=-2, dim2=-1).add_(skip.view(-1, 1, 1))

        decays = _chunk_decays(cum[..., -1], masks.boundary)  # (B, H, K + 1, K + 1)
        to_end = _power(cum[..., -1:] - source, masks.to_end)
        from_start = _power(cum, masks.from_start)
        b_decayed = _spread(to_end, rank) * b_chunks.unsqueeze(1)  # (B, H, K, QR, N)
        added = _products(b_decayed.mT, inputs)  # (B, H, K, N, P)
        states = _products(decays[..., 1:], added.flatten(-2)).unflatten(-1, added.shape[-2:])
        if h0 is not None:
            states.addcmul_(decays[..., 0, None, None], h0.unsqueeze(2))
        entering, h = states[:, :, :-1], states[:, :, -1]

        c_decayed = _spread(from_start, rank) * c_chunks.unsqueeze(1)
        y = _products(mixing, inputs)
        _add_products(y, c_decayed, entering)
        ctx.save_for_backward(
            x, rank_in, b_chunks, c_chunks, skip, h0,
            inputs, weights, scores, to_end, from_start, added, decays, states,
        )  # fmt: skip
        ctx.rank = rank
        y = y.view(*y.shape[:2], chunks * size, rank, -1)[:, :, :length]
        return y.permute(0, 2, 1, 3, 4), h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, rank_in, b, c, skip, h0,
            inputs, weights, scores, to_end, from_start, added, decays, states,
        ) = ctx.saved_tensors  # fmt: skip
        rank, length = ctx.rank, x.shape[1]
        chunks, size = weights.shape[2], weights.shape[3]
        grad = _rank_chunks(grads[0], None, chunks, size)  # (B, H, K, QR, P)
        mixing = _weighted_scores(weights, scores, rank)
        mixing.diagonal(dim1=-2, dim2=-1).add_(skip.view(-1, 1, 1))
        grad_inputs = _products(mixing.mT, grad)
        grad_mixing = _products(grad, inputs.mT, out=mixing)
        pair = _backward_pairs(grad_mixing, weights, scores, rank)
        grad_scores, grad_gamma, grad_skip, grad_cum, grad_log_weight = pair

        # States between chunks.
        c_decayed = _spread(from_start, rank) * c.unsqueeze(1)
        grad_states = torch.empty_like(states)
        grad_states[:, :, :-1] = _products(c_decayed.mT, grad)
        grad_states[:, :, -1] = grads[1]
        grad_added = _products(decays[..., 1:].mT, grad_states.flatten(-2)).view_as(added)
        grad_decays = torch.zeros_like(decays)
        grad_decays[..., 1:] = _products(grad_states.flatten(-2), added.flatten(-2).mT)
        grad_h0 = None
        if h0 is not None:
            grad_decays[..., 0] = (grad_states * h0.unsqueeze(2)).sum((-2, -1))
            grad_h0 = (grad_states * decays[..., 0, None, None]).sum(2)
        grad_totals = _backward_chunk_decays(grad_decays.mul_(decays))

        # Sources into states, states into targets.
        b_decayed = _spread(to_end, rank) * b.unsqueeze(1)
        _add_products(grad_inputs, b_decayed, grad_added)
        grad = _products(grad, states[:, :, :-1].mT, out=c_decayed)
        grad_c, grad_from_start = _backward_decayed(grad, from_start, c, rank)
        grad = _products(inputs, grad_added.mT, out=b_decayed)
        grad_b, grad_to_end = _backward_decayed(grad, to_end, b, rank)
        grad_b.view(-1, *b.shape[-2:]).baddbmm_(grad_scores.mT.flatten(0, 1), c.flatten(0, 1))
        grad_c.view(-1, *c.shape[-2:]).baddbmm_(grad_scores.flatten(0, 1), b.flatten(0, 1))

        grad_cum = grad_cum.add_(grad_from_start).sub_(grad_to_end)
        grad_log_weight.add_(grad_to_end)
        grad_cum[..., -1] += grad_totals + grad_to_end.sum(-1)
        grad_log_decay = grad_cum.flip(-1).cumsum(-1).flip(-1)
        per_step = (
            value.reshape(*value.shape[:2], -1)[..., :length].transpose(1, 2)
            for value in (grad_log_decay, grad_log_weight, grad_gamma)
        )
        grad_x, grad_rank_in = _backward_rank(grad_inputs, x, rank_in, rank)
        shared = (
            value.reshape(len(x), chunks * size, rank, -1)[:, :length] for value in (grad_b, grad_c)
        )
        return grad_x, grad_rank_in, *shared, *per_step, grad_skip, grad_h0, None


def _backward_pairs(
    grad_mixing: Tensor, weights: Tensor, scores: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, gamma, skip, cum and log_weight from that of M (overwritten)."""
    grad_skip = grad_mixing.diagonal(dim1=-2, dim2=-1).sum((0, 2, 3))
    size = weights.shape[-1]
    split = (*weights.shape[:3], size, rank, size, rank)
    scores = scores.unsqueeze(1)
    if rank == 1:
        diagonal = grad_mixing.diagonal(dim1=-2, dim2=-1)
        grad_gamma = diagonal * scores.diagonal(dim1=-2, dim2=-1)  # (B, H, K, Q)
        grad_mixing.mul_(weights)
        grad_scores = grad_mixing.sum(1)  # (B, K, Q, Q)
        exponents = grad_mixing.mul_(scores)
    else:
        blocks = scores.view(*scores.shape[:3], *split[3:]).diagonal(dim1=3, dim2=5)
        grad_blocks = grad_mixing.view(split).diagonal(dim1=3, dim2=5)  # (B, H, K, R, R, Q)
        grad_gamma = (grad_blocks * blocks).sum((3, 4))
        grad_mixing.view(split).mul_(weights[..., :, None, :, None])
        grad_scores = grad_mixing.sum(1)
        exponents = grad_mixing.mul_(scores).view(split).sum((4, 6))
    exponents.diagonal(dim1=-2, dim2=-1).zero_()
    rows, columns = exponents.sum(-1), exponents.sum(-2)
    return grad_scores, grad_gamma, grad_skip, rows - columns, columns


def _backward_chunk_decays(exponents: Tensor) -> Tensor:
    """Gradient of the chunks' totals (B, H, K) from (dD o D) (B, H, K+1, K+1).

    The total of chunk i is part of every decay from a boundary <= i to a boundary > i.
    """
    running = exponents.sum(-1) - exponents.sum(-2)  # gradient of the running sums
    return running[..., 1:].flip(-1).cumsum(-1).flip(-1)


def _backward_decayed(
    grad: Tensor, factor: Tensor, shared: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Gradients of shared and log factor from that of factor o shared, (B, H, K, QR, N)."""
    grad.mul_(_spread(factor, rank))
    grad_shared = grad.sum(1)
    exponents = grad.mul_(shared.unsqueeze(1)).sum(-1)
    if rank > 1:
        exponents = exponents.unflatten(-1, (-1, rank)).sum(-1)
    return grad_shared, exponents


def _backward_rank(
    grad_inputs: Tensor, x: Tensor, rank_in: Tensor | None, rank: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (B, T, H, P) and rank_in (H, R, P)."""
    batch, heads, chunks, rows, width = grad_inputs.shape
    grad = grad_inputs.view(batch, heads, chunks * rows // rank, rank, width)
    grad = grad[:, :, : x.shape[1]].permute(0, 2, 1, 3, 4)  # (B, T, H, R, P)
    if rank_in is None:
        return grad.squeeze(3), None
    return (grad * rank_in).sum(3), (grad * x.unsqueeze(3)).sum((0, 1))
