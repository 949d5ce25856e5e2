"""Matrix products of the chunked scan with their hand-written gradient.

Autograd of the formulas keeps every (H, Q, Q) and (H, T, N) intermediate and walks each of them
several times; written out, the backward pass keeps the decays alone and works in place.

Chunks meet only in the states between them, so everything with an axis of Q Q or of ranks is formed
for a slab of them at a time, never for the whole row, and backward forms it again from x, B and C:
the slab stays in the cache and the scan's own memory is a few rows' of its input.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ssd_slabs import (
    Cut,
    add_products,
    mix,
    power,
    products,
    rank_first,
    ranked,
    scale_pairs,
    shared,
    tile,
    unshared,
    weigh,
)

_LOG2_E = 1.0 / math.log(2.0)


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from casting the products: sums of decays need the full precision."""

    @functools.wraps(method)
    def wrapped(ctx: Any, *args: Any) -> Any:
        devices = [arg.device.type for arg in args if isinstance(arg, Tensor)] or ["cpu"]
        with torch.autocast(device_type=devices[0], enabled=False):
            return method(ctx, *args)

    return wrapped


def _chunk_decays(totals: Tensor, boundary: Tensor) -> Tensor:
    """Decay from each chunk boundary to each later one: totals (B, H, K) -> (B, H, K+1, K+1).

    Running sums over a whole row grow with its length, so their differences are taken in fp64.
    """
    running = torch.nn.functional.pad(totals.double().cumsum(-1), (1, 0))
    gaps = (running.unsqueeze(-1) - running.unsqueeze(-2)).to(totals.dtype)
    return power(gaps, boundary)


class ChunkedScan(torch.autograd.Function):
    """(x, rank_in, b, c, log_decay, log_weight, gamma, skip, h0, masks) -> y, final h.

    x (B, T, H, P); rank_in (H, R, P) or None; b, c (B, T, R, N), rotated; log_decay, log_weight,
    gamma (B, T, H); skip (H,); h0 (B, H, N, P) or None; masks: ScanMasks.
    y (B, T, H, R, P); h (B, H, N, P).
    """

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, rank_in, b, c, log_decay, log_weight, gamma, skip, h0, masks = args
        batch, length, heads, width = x.shape
        rank, size = b.shape[2:]
        cut = Cut(batch, -(-length // masks.chunk_len), masks.chunk_len, length)
        x, b, c = cut.steps(x), cut.steps(b), cut.steps(c)
        cum = cut.heads(log_decay).mul_(_LOG2_E).cumsum(-1)  # (G, H, Q)
        source = cum - cut.heads(log_weight).mul_(_LOG2_E)
        gamma, pair = cut.heads(gamma), cut.mask(masks.pair)
        decays = _chunk_decays(cut.by_row(cum[..., -1].contiguous()), masks.boundary)
        to_end = power(cum[..., -1:] - source, cut.mask(masks.to_end))
        from_start = power(cum.clone(), cut.mask(masks.from_start))

        added = x.new_empty(len(x), heads, size, width)  # (G, H, N, P)
        for chunks, parts in cut.slabs(heads, rank):
            b_slab = shared(b[chunks]).unsqueeze(1)
            for part in parts:
                decayed = tile(to_end[chunks, part], rank) * b_slab
                inputs = ranked(x[chunks], part, rank_in)
                products(decayed.mT, inputs, out=added[chunks, part])
        entering, h = _join_states(cut, decays, added, h0)

        y = x.new_empty(*x.shape[:3], rank, width)  # (G, Q, H, R, P)
        for chunks, parts in cut.slabs(heads, rank):
            b_slab, c_slab = shared(b[chunks]), shared(c[chunks])
            scores = (c_slab @ b_slab.mT).unsqueeze(1)  # (n, 1, RQ, RQ)
            for part in parts:
                weights = weigh(cum, source, gamma, pair, (chunks, part))
                mixing = mix(scores, weights, skip[part], rank)
                mixed = products(mixing, ranked(x[chunks], part, rank_in))
                decayed = tile(from_start[chunks, part], rank) * c_slab.unsqueeze(1)
                add_products(mixed, decayed, entering[chunks, part])
                y[chunks, :, part] = mixed.unflatten(2, (rank, -1)).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(
            *(x, rank_in, b, c, skip, h0, cum, source, gamma, pair),
            *(to_end, from_start, added, decays, entering),
        )
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return cut.joined(y), h

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (
            x, rank_in, b, c, skip, h0, cum, source, gamma, pair,
            to_end, from_start, added, decays, entering,
        ) = ctx.saved_tensors  # fmt: skip
        cut, heads, rank = ctx.cut, x.shape[2], b.shape[2]
        grad_y, grad_h = grads
        if grad_y is None:
            grad_y = x.new_zeros(cut.rows, cut.length, heads, rank, x.shape[-1])
        grad_y = cut.steps(grad_y)  # (G, Q, H, R, P)
        grad_entering = _backward_entering(cut, grad_y, c, from_start, like=added)
        grad_added, grad_h0, grad_totals = _backward_states(
            cut, grad_entering, grad_h, decays, added, h0
        )
        del grad_entering
        found = _Gradients.zeros(x, rank_in, b, c, skip, to_end)
        for chunks, parts in cut.slabs(heads, rank):
            b_slab, c_slab = shared(b[chunks]), shared(c[chunks])
            scores = (c_slab @ b_slab.mT).unsqueeze(1)
            grad_scores = torch.zeros_like(scores)
            for part in parts:
                place = (chunks, part)
                _backward_slab(
                    _Slab(
                        inputs=ranked(x[chunks], part, rank_in),
                        grad=rank_first(grad_y[chunks], part),
                        b=b_slab.unsqueeze(1),
                        c=c_slab.unsqueeze(1),
                        scores=scores,
                        weights=weigh(cum, source, gamma, pair, place),
                        to_end=to_end[place],
                        from_start=from_start[place],
                        entering=entering[place],
                        grad_added=grad_added[place],
                        skip=skip[part],
                    ),
                    place, found, grad_scores, x=x[chunks], rank_in=rank_in,
                )  # fmt: skip
            grad_scores = grad_scores.squeeze(1)
            found.b[chunks] += unshared(grad_scores.mT @ c_slab, rank)
            found.c[chunks] += unshared(grad_scores @ b_slab, rank)
        found.cum[..., -1] += cut.by_chunk(grad_totals)
        grad_log_decay = found.cum.flip(-1).cumsum(-1).flip(-1)
        return (
            cut.joined(found.x),
            found.rank_in,
            cut.joined(found.b),
            cut.joined(found.c),
            *(
                cut.joined(value.transpose(1, 2).contiguous())
                for value in (grad_log_decay, found.log_weight, found.gamma)
            ),
            found.skip,
            grad_h0,
            None,
        )


class _Slab(NamedTuple):
    """What the gradient of a slab of n chunks and h heads is made of.

    inputs, grad (n, h, R Q, P); b, c (n, 1, R Q, N); scores (n, 1, R Q, R Q); weights
    (n, h, Q, Q); to_end, from_start (n, h, Q); entering, grad_added (n, h, N, P); skip (h,).
    """

    inputs: Tensor
    grad: Tensor
    b: Tensor
    c: Tensor
    scores: Tensor
    weights: Tensor
    to_end: Tensor
    from_start: Tensor
    entering: Tensor
    grad_added: Tensor
    skip: Tensor


class _Gradients(NamedTuple):
    """Gradients of all chunks, filled slab by slab: x (G, Q, H, P), b and c (G, Q, R, N), the
    rest (G, H, Q) but for rank_in (H, R, P) and skip (H,)."""

    x: Tensor
    rank_in: Tensor | None
    b: Tensor
    c: Tensor
    skip: Tensor
    gamma: Tensor
    cum: Tensor
    log_weight: Tensor

    @classmethod
    def zeros(
        cls, x: Tensor, rank_in: Tensor | None, b: Tensor, c: Tensor, skip: Tensor, steps: Tensor
    ) -> _Gradients:
        grad_b, grad_c = (
            torch.zeros_like(v, memory_format=torch.contiguous_format) for v in (b, c)
        )
        return cls(
            torch.empty_like(x, memory_format=torch.contiguous_format),
            None if rank_in is None else torch.zeros_like(rank_in),
            grad_b,
            grad_c,
            torch.zeros_like(skip),
            *(torch.empty_like(steps) for _ in range(3)),
        )


def _join_states(
    cut: Cut, decays: Tensor, added: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States entering each chunk (G, H, N, P) and the last one (B, H, N, P)."""
    sources = cut.by_row(added.flatten(2))  # (B, H, K, N P)
    entering = products(decays[..., :-1, 1:], sources)
    h = products(decays[..., -1:, 1:], sources)[..., 0, :].unflatten(-1, added.shape[2:])
    if h0 is not None:
        entering.addcmul_(decays[..., :-1, 0, None], h0.flatten(2).unsqueeze(2))
        h = torch.addcmul(h, decays[..., -1, 0, None, None], h0)
    return cut.by_chunk(entering).unflatten(-1, added.shape[2:]), h


def _backward_entering(
    cut: Cut, grad_y: Tensor, c: Tensor, from_start: Tensor, *, like: Tensor
) -> Tensor:
    """Gradient of V (G, H, N, P) from that of y (G, Q, H, R, P)."""
    grad_entering = torch.empty_like(like)
    heads, rank = grad_y.shape[2:4]
    for chunks, parts in cut.slabs(heads, rank):
        c_slab = shared(c[chunks]).unsqueeze(1)
        for part in parts:
            decayed = tile(from_start[chunks, part], rank) * c_slab
            grad = rank_first(grad_y[chunks], part)
            products(decayed.mT, grad, out=grad_entering[chunks, part])
    return grad_entering


def _backward_slab(
    slab: _Slab,
    place: tuple[slice, slice],
    found: _Gradients,
    grad_scores: Tensor,
    *,
    x: Tensor,
    rank_in: Tensor | None,
) -> None:
    """Fill `found` at `place`, and add to grad_scores (n, 1, R Q, R Q)."""
    chunks, part = place
    rank = slab.scores.shape[-1] // slab.weights.shape[-1]
    mixing = mix(slab.scores, slab.weights, slab.skip, rank)
    grad_inputs = products(mixing.mT, slab.grad)
    grad_mixing = products(slab.grad, slab.inputs.mT, out=mixing)
    cum, log_weight = _backward_pairs(grad_mixing, slab, place, found, grad_scores)

    c_decayed = products(slab.grad, slab.entering.mT)  # gradient of F o C
    grad_c, grad_from_start = _backward_decayed(c_decayed, slab.from_start, slab.c, rank)
    b_decayed = torch.mul(tile(slab.to_end, rank), slab.b, out=c_decayed)
    add_products(grad_inputs, b_decayed, slab.grad_added)
    products(slab.inputs, slab.grad_added.mT, out=b_decayed)  # gradient of E o B
    grad_b, grad_to_end = _backward_decayed(b_decayed, slab.to_end, slab.b, rank)

    cum.add_(grad_from_start).sub_(grad_to_end)
    cum[..., -1] += grad_to_end.sum(-1)
    found.cum[place], found.log_weight[place] = cum, log_weight.add_(grad_to_end)
    found.b[chunks] += unshared(grad_b, rank)
    found.c[chunks] += unshared(grad_c, rank)
    if rank_in is None or found.rank_in is None:
        found.x[chunks, :, part] = grad_inputs.transpose(1, 2)
        return
    by_rank = grad_inputs.unflatten(2, (rank, -1))  # (n, h, R, Q, P)
    own = x[:, :, part].transpose(1, 2).unsqueeze(2)
    found.rank_in[part] += (by_rank * own).sum((0, 3))
    found.x[chunks, :, part] = (by_rank * rank_in[part, :, None]).sum(2).transpose(1, 2)


def _step_diagonal(pairs: Tensor, rank: int) -> Tensor:
    """Entries (r t, r' t) of pairs (..., R Q, R Q): (..., R, R, Q), a view."""
    size = pairs.shape[-1] // rank
    tiles = pairs.view(*pairs.shape[:-2], rank, size, rank, size)
    return tiles.diagonal(dim1=-3, dim2=-1)


def _sum_ranks(value: Tensor, rank: int) -> Tensor:
    """(..., R Q) -> (..., Q)."""
    return value if rank == 1 else value.unflatten(-1, (rank, -1)).sum(-2)


def _backward_pairs(
    grad_mixing: Tensor,
    slab: _Slab,
    place: tuple[slice, slice],
    found: _Gradients,
    grad_scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of cum and log_weight (n, h, Q) from that of M (overwritten); those of gamma, skip
    and scores go into `found` and grad_scores."""
    rank = slab.scores.shape[-1] // slab.weights.shape[-1]
    found.skip[place[1]] += grad_mixing.diagonal(dim1=-2, dim2=-1).sum((0, 2))
    same_step = _step_diagonal(grad_mixing, rank) * _step_diagonal(slab.scores, rank)
    grad_gamma = same_step.sum((-3, -2))
    found.gamma[place] = grad_gamma
    scale_pairs(grad_mixing, slab.weights, rank, out=grad_mixing)
    for own in grad_mixing.unbind(1):
        grad_scores += own.unsqueeze(1)
    exponents = grad_mixing.mul_(slab.scores)
    # Gamma has no exponent: its row and column entries cancel in cum and leave log_weight here.
    diagonal = grad_gamma * slab.weights.diagonal(dim1=-2, dim2=-1)
    rows = _sum_ranks(exponents.sum(-1), rank)
    columns = _sum_ranks(exponents.sum(-2), rank)
    return rows - columns, columns - diagonal


def _backward_states(
    cut: Cut,
    grad_entering: Tensor,
    grad_h: Tensor | None,
    decays: Tensor,
    added: Tensor,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of S (G, H, N, P), h0 and the chunks' totals (B, H, K)."""
    shape = added.shape[2:]
    flat, sources = (cut.by_row(value.flatten(2)) for value in (grad_entering, added))
    grad_added = products(decays[..., :-1, 1:].mT, flat)  # (B, H, K, N P)
    grad_decays = torch.zeros_like(decays)
    grad_decays[..., :-1, 1:] = products(flat, sources.mT)
    grad_h0 = None
    if h0 is not None:
        start = h0.flatten(2).unsqueeze(2)
        grad_decays[..., :-1, 0] = (flat * start).sum(-1)
        grad_h0 = (flat * decays[..., :-1, 0, None]).sum(2).view_as(h0)
    if grad_h is not None:
        end = grad_h.flatten(2).unsqueeze(2)
        grad_added.addcmul_(decays[..., -1, 1:, None], end)
        grad_decays[..., -1, 1:] = (end * sources).sum(-1)
        if h0 is not None and grad_h0 is not None:
            grad_decays[..., -1, 0] = (grad_h * h0).sum((-2, -1))
            grad_h0 = grad_h0 + grad_h * decays[..., -1, 0, None, None]
    grad_totals = _backward_chunk_decays(grad_decays.mul_(decays))
    return cut.by_chunk(grad_added).unflatten(-1, shape), grad_h0, grad_totals


def _backward_chunk_decays(exponents: Tensor) -> Tensor:
    """Gradient of the chunks' totals (B, H, K) from (dD o D) (B, H, K+1, K+1).

    The total of chunk i is part of every decay from a boundary <= i to a boundary > i.
    """
    running = exponents.sum(-1) - exponents.sum(-2)  # gradient of the running sums
    return running[..., 1:].flip(-1).cumsum(-1).flip(-1)


def _backward_decayed(
    grad: Tensor, factor: Tensor, value: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the value (b or c, (n, R Q, N)) and of the log factor (n, h, Q) from that of
    their product (overwritten)."""
    grad.mul_(tile(factor, rank))  # (n, h, RQ, N)
    grad_value = grad.sum(1)
    return grad_value, _sum_ranks(grad.mul_(value).sum(-1), rank)
