"""Matrix products of the chunked scan with their hand-written gradient.

Autograd of the formulas keeps every (H, Q, Q) and (H, T, N) intermediate and walks each of them
several times; written out, the backward pass keeps two of them and works in place.

Layout: heads before time, (B, H, K, R Q, P) for K chunks of Q steps with R ranks, so that each
product is one batched GEMM over B H K. What heads share (B, C, their product) has no head axis.
Ranks come before steps, so that a factor per step is a repeated tile with a long inner axis.

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

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = 1.0 / math.log(2.0)
_LIMIT = 64.0


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from casting the products: sums of decays need the full precision."""

    @functools.wraps(method)
    def wrapped(ctx: Any, *args: Any) -> Any:
        devices = [arg.device.type for arg in args if isinstance(arg, Tensor)] or ["cpu"]
        with torch.autocast(device_type=devices[0], enabled=False):
            return method(ctx, *args)

    return wrapped


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
    """b or c (B, T, R, N) -> (B, K, R Q, N), contiguous."""
    batch, _, rank, width = value.shape
    value = _pad_steps(value, chunks * size).reshape(batch, chunks, size, rank, width)
    return value.transpose(2, 3).reshape(batch, chunks, rank * size, width)


def _shared_steps(value: Tensor, rank: int, length: int) -> Tensor:
    """Inverse of `_shared_chunks`: (B, K, R Q, N) -> (B, T, R, N)."""
    batch, _, rows, width = value.shape
    value = value.view(batch, -1, rank, rows // rank, width).transpose(2, 3)
    return value.reshape(batch, -1, rank, width)[:, :length]


def _rank_chunks(value: Tensor, chunks: int, size: int) -> Tensor:
    """(B, T, H, R, P) -> (B, H, K, R Q, P), contiguous."""
    batch, _, heads, _, width = value.shape
    value = _pad_steps(value, chunks * size).unflatten(1, (chunks, size))
    return value.permute(0, 3, 1, 4, 2, 5).reshape(batch, heads, chunks, -1, width)


def _expand_rank(x: Tensor, rank_in: Tensor) -> Tensor:
    """x (B, H, K, Q, P), rank_in (H, R, P) -> (B, H, K, R Q, P)."""
    return (x.unsqueeze(3) * rank_in[:, None, :, None]).flatten(3, 4)


def _tile(factor: Tensor, rank: int) -> Tensor:
    """(..., Q) -> (..., R Q, 1): one factor per step, for all its ranks."""
    if rank > 1:
        factor = factor.repeat(*[1] * (factor.dim() - 1), rank)
    return factor.unsqueeze(-1)


def _scale_pairs(value: Tensor, weights: Tensor, rank: int, *, out: Tensor | None = None) -> Tensor:
    """value (B, H or 1, K, R Q, R Q) o weights (B, H, K, Q, Q), repeated for all pairs of ranks."""
    if rank == 1:
        return torch.mul(value, weights, out=out)
    size = weights.shape[-1]
    tiles = (rank, size, rank, size)
    result = weights.new_empty(*weights.shape[:3], rank * size, rank * size) if out is None else out
    torch.mul(
        value.view(*value.shape[:3], *tiles),
        weights[..., None, :, None, :],
        out=result.view(*result.shape[:3], *tiles),
    )
    return result


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
    @_without_autocast
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, rank_in, b, c, log_decay, log_weight, gamma, skip, h0, masks = args
        length, rank, size = x.shape[1], b.shape[2], masks.chunk_len
        chunks = -(-length // size)
        x_chunks = _rank_chunks(x.unsqueeze(3), chunks, size)  # (B, H, K, Q, P)
        inputs = x_chunks if rank_in is None else _expand_rank(x_chunks, rank_in)
        b_chunks, c_chunks = (_shared_chunks(v, chunks, size) for v in (b, c))
        cum = _head_chunks(log_decay, chunks, size).mul_(_LOG2_E).cumsum(-1)  # (B, H, K, Q)
        source = cum - _head_chunks(log_weight, chunks, size).mul_(_LOG2_E)
        weights = cum.unsqueeze(-1) - source.unsqueeze(-2)  # (B, H, K, Q, Q)
        _power(weights, masks.pair)
        weights.diagonal(dim1=-2, dim2=-1).copy_(_head_chunks(gamma, chunks, size))
        scores = (c_chunks @ b_chunks.mT).unsqueeze(1)  # (B, 1, K, RQ, RQ)
        mixing = _mix(scores, weights, skip, rank)

        decays = _chunk_decays(cum[..., -1], masks.boundary)  # (B, H, K + 1, K + 1)
        to_end = _power(cum[..., -1:] - source, masks.to_end)
        from_start = _power(cum, masks.from_start)
        b_decayed = _tile(to_end, rank) * b_chunks.unsqueeze(1)  # (B, H, K, RQ, N)
        added = _products(b_decayed.mT, inputs)  # (B, H, K, N, P)
        entering = _products(decays[..., :-1, 1:], added.flatten(-2)).view_as(added)
        h = _products(decays[..., -1:, 1:], added.flatten(-2)).view_as(added[:, :, 0])
        if h0 is not None:
            entering.addcmul_(decays[..., :-1, 0, None, None], h0.unsqueeze(2))
            h.addcmul_(decays[..., -1, 0, None, None], h0)

        c_decayed = torch.mul(_tile(from_start, rank), c_chunks.unsqueeze(1), out=b_decayed)
        y = _add_products(_products(mixing, inputs), c_decayed, entering)
        ctx.save_for_backward(
            x_chunks, rank_in, b_chunks, c_chunks, skip, h0, None if rank_in is None else inputs,
            weights, scores, to_end, from_start, added, decays, entering,
        )  # fmt: skip
        ctx.length, ctx.rank = length, rank
        ctx.set_materialize_grads(False)
        y = y.view(*y.shape[:3], rank, size, -1).permute(0, 2, 4, 1, 3, 5)  # (B, K, Q, H, R, P)
        return _join_chunks(y, length), h

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (
            x, rank_in, b, c, skip, h0, inputs,
            weights, scores, to_end, from_start, added, decays, entering,
        ) = ctx.saved_tensors  # fmt: skip
        rank, length, (chunks, size) = ctx.rank, ctx.length, weights.shape[2:4]
        inputs = x if inputs is None else inputs
        grad_y, grad_h = grads
        if grad_y is None:
            grad_y = x.new_zeros(len(x), length, x.shape[1], rank, x.shape[-1])
        grad = _rank_chunks(grad_y, chunks, size)  # (B, H, K, RQ, P)
        mixing = _mix(scores, weights, skip, rank)
        grad_inputs = _products(mixing.mT, grad)
        grad_mixing = _products(grad, inputs.mT, out=mixing)
        pair = _backward_pairs(grad_mixing, weights, scores, rank)
        grad_scores, grad_gamma, grad_skip, grad_cum, grad_log_weight = pair

        c_decayed = _tile(from_start, rank) * c.unsqueeze(1)
        grad_entering = _products(c_decayed.mT, grad)  # (B, H, K, N, P)
        grad_added, grad_h0, grad_totals = _backward_states(
            grad_entering, grad_h, decays, added, h0
        )
        grad_c_decayed = _products(grad, entering.mT, out=c_decayed)
        grad_c, grad_from_start = _backward_decayed(grad_c_decayed, from_start, c, rank)
        b_decayed = torch.mul(_tile(to_end, rank), b.unsqueeze(1), out=grad_c_decayed)
        _add_products(grad_inputs, b_decayed, grad_added)
        grad_b_decayed = _products(inputs, grad_added.mT, out=b_decayed)
        grad_b, grad_to_end = _backward_decayed(grad_b_decayed, to_end, b, rank)
        _add_products(grad_b, grad_scores.mT, c)
        _add_products(grad_c, grad_scores, b)

        grad_cum = grad_cum.add_(grad_from_start).sub_(grad_to_end)
        grad_log_weight.add_(grad_to_end)
        grad_cum[..., -1] += grad_totals + grad_to_end.sum(-1)
        grad_log_decay = grad_cum.flip(-1).cumsum(-1).flip(-1)
        grad_x, grad_rank_in = _backward_rank(grad_inputs, x, rank_in)
        return (
            _join_chunks(grad_x.permute(0, 2, 3, 1, 4), length),
            grad_rank_in,
            _shared_steps(grad_b, rank, length),
            _shared_steps(grad_c, rank, length),
            *(
                _join_chunks(value.permute(0, 2, 3, 1), length)
                for value in (grad_log_decay, grad_log_weight, grad_gamma)
            ),
            grad_skip,
            grad_h0,
            None,
        )


def _join_chunks(value: Tensor, length: int) -> Tensor:
    """(B, K, Q, ...) -> (B, T, ...): a view where the ranks do not lie between K and Q."""
    return value.flatten(1, 2)[:, :length]


def _mix(scores: Tensor, weights: Tensor, skip: Tensor, rank: int) -> Tensor:
    """M = W o G + skip I, (B, H, K, RQ, RQ)."""
    mixing = _scale_pairs(scores, weights, rank)
    mixing.diagonal(dim1=-2, dim2=-1).add_(skip.view(-1, 1, 1))
    return mixing


def _step_diagonal(pairs: Tensor, rank: int) -> Tensor:
    """Entries (r t, r' t) of pairs (..., R Q, R Q): (..., R, R, Q), a view."""
    size = pairs.shape[-1] // rank
    tiles = pairs.view(*pairs.shape[:-2], rank, size, rank, size)
    return tiles.diagonal(dim1=-3, dim2=-1)


def _sum_ranks(value: Tensor, rank: int) -> Tensor:
    """(..., R Q) -> (..., Q)."""
    return value if rank == 1 else value.unflatten(-1, (rank, -1)).sum(-2)


def _backward_pairs(
    grad_mixing: Tensor, weights: Tensor, scores: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, gamma, skip, cum and log_weight from that of M (overwritten)."""
    grad_skip = grad_mixing.diagonal(dim1=-2, dim2=-1).sum((0, 2, 3))
    products = _step_diagonal(grad_mixing, rank) * _step_diagonal(scores, rank)
    grad_gamma = products.sum((-3, -2))  # (B, H, K, Q)
    _scale_pairs(grad_mixing, weights, rank, out=grad_mixing)
    grad_scores = grad_mixing.sum(1)  # (B, K, RQ, RQ)
    exponents = grad_mixing.mul_(scores)
    # Gamma has no exponent: its row and column entries cancel in cum and leave log_weight here.
    diagonal = grad_gamma * weights.diagonal(dim1=-2, dim2=-1)
    rows = _sum_ranks(exponents.sum(-1), rank)
    columns = _sum_ranks(exponents.sum(-2), rank)
    return grad_scores, grad_gamma, grad_skip, rows - columns, columns - diagonal


def _backward_states(
    grad_entering: Tensor, grad_h: Tensor | None, decays: Tensor, added: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of S (B, H, K, N, P), h0 and the chunks' totals (B, H, K)."""
    flat, sources = grad_entering.flatten(-2), added.flatten(-2)
    grad_added = _products(decays[..., :-1, 1:].mT, flat).view_as(added)
    grad_decays = torch.zeros_like(decays)
    grad_decays[..., :-1, 1:] = _products(flat, sources.mT)
    grad_h0 = None
    if h0 is not None:
        grad_decays[..., :-1, 0] = (grad_entering * h0.unsqueeze(2)).sum((-2, -1))
        grad_h0 = (grad_entering * decays[..., :-1, 0, None, None]).sum(2)
    if grad_h is not None:
        grad_added.addcmul_(decays[..., -1, 1:, None, None], grad_h.unsqueeze(2))
        grad_decays[..., -1, 1:] = (grad_h.unsqueeze(2) * added).sum((-2, -1))
        if h0 is not None and grad_h0 is not None:
            grad_decays[..., -1, 0] = (grad_h * h0).sum((-2, -1))
            grad_h0 = grad_h0 + grad_h * decays[..., -1, 0, None, None]
    return grad_added, grad_h0, _backward_chunk_decays(grad_decays.mul_(decays))


def _backward_chunk_decays(exponents: Tensor) -> Tensor:
    """Gradient of the chunks' totals (B, H, K) from (dD o D) (B, H, K+1, K+1).

    The total of chunk i is part of every decay from a boundary <= i to a boundary > i.
    """
    running = exponents.sum(-1) - exponents.sum(-2)  # gradient of the running sums
    return running[..., 1:].flip(-1).cumsum(-1).flip(-1)


def _backward_decayed(
    grad: Tensor, factor: Tensor, shared: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Gradients of shared and log factor from that of factor o shared (overwritten)."""
    grad.mul_(_tile(factor, rank))  # (B, H, K, RQ, N)
    grad_shared = grad.sum(1)
    return grad_shared, _sum_ranks(grad.mul_(shared.unsqueeze(1)).sum(-1), rank)


def _backward_rank(
    grad_inputs: Tensor, x: Tensor, rank_in: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (B, H, K, Q, P) and rank_in (H, R, P)."""
    if rank_in is None:
        return grad_inputs, None
    grad = grad_inputs.view(*x.shape[:3], rank_in.shape[1], *x.shape[3:])  # (B, H, K, R, Q, P)
    grad_rank = (grad * x.unsqueeze(3)).sum((0, 2, 4))
    return (grad * rank_in[:, None, :, None]).sum(3), grad_rank
