"""Chunked product path and single step of the Mamba-3 scan.

The recurrence (definition: `model.reference_mamba`) unrolls to one masked quadratic form. Source s
reaches target t > s with weight exp(cum_t - cum_s) w_s, where cum is the running sum of log decays
and w_s = trap_s dt_s + (1 - trap_{s+1}) dt_{s+1} joins the source's own term and the trapezoid's
second term of the step after it (its alpha_{s+1} completes the decay product). On the diagonal
only trap_t dt_t is known at t. Rows are cut into chunks: quadratic inside, states between.

B and C are one group for all heads, as in Mamba-2, including bias and rotation: C B^T is formed
once per chunk and not once per head, and the rotation touches R N numbers per token instead of
H R N. Heads differ in X, step, decay and trapezoid.

Decays are exponentials of differences of cum, <= 0 wherever the mask is open; a document boundary
is a closed mask (a factor 0), so nothing crosses it, not even 1e-30.

Sources: Mamba-2 2405.21060 (chunked form), Mamba-3 2603.15569 (trapezoid, rotation, rank R).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.opaque import apply_opaque
from model.ssd_core import ChunkedScan

_TINY = 1e-37


@dataclass(slots=True, kw_only=True)
class ScanInputs:
    """What one scan reads; H heads of width P, state size N, rank R, J rotated pairs.

    x (B, T, H, P); b, c (B, T, R, N) before rotation; dt (B, T, H) > 0; log_decay (B, T, H) <= 0;
    trap (B, T, H) in [0, 1] or None for 1 (the Mamba-2 recurrence); theta (B, T, J) angle
    increments in radians or None; skip (H,); rank_in (H, R, P), the factors that make the R inputs
    of a head from x, or None for R = 1.
    """

    x: Tensor
    b: Tensor
    c: Tensor
    dt: Tensor
    log_decay: Tensor
    skip: Tensor
    trap: Tensor | None = None
    theta: Tensor | None = None
    rank_in: Tensor | None = None

    def expand_rank(self, x: Tensor) -> Tensor:
        """x (..., H, P) -> (..., H, R, P)."""
        x = x.unsqueeze(-2)
        return x if self.rank_in is None else x * self.rank_in


@dataclass(slots=True, kw_only=True)
class MambaState:
    """What a row must keep to be continued; all tensors have the batch first.

    h (B, H, N, P); prev_b (B, R, N), rotated, and prev_x (B, H, P): the last valid step, whose
    trapezoid term comes with the next one; angle (B, J) in [0, 2 pi).
    """

    h: Tensor
    prev_b: Tensor
    prev_x: Tensor
    angle: Tensor

    @classmethod
    def zeros(cls, inputs: ScanInputs) -> MambaState:
        """The state before the first step of a document."""
        batch, _, heads, width = inputs.x.shape
        rank, size = inputs.b.shape[2:]
        num_angles = 0 if inputs.theta is None else inputs.theta.shape[-1]
        new = inputs.x.new_zeros
        return cls(
            h=new(batch, heads, size, width),
            prev_b=new(batch, rank, size),
            prev_x=new(batch, heads, width),
            angle=new(batch, num_angles),
        )

    def reorder(self, index: Tensor) -> MambaState:
        """Rows picked by index (B',) int64."""
        return MambaState(
            h=self.h.index_select(0, index),
            prev_b=self.prev_b.index_select(0, index),
            prev_x=self.prev_x.index_select(0, index),
            angle=self.angle.index_select(0, index),
        )


@dataclass(slots=True, kw_only=True)
class ScanMasks:
    """Causality, documents and padding as factors 0 or 1 of decays, by chunk.

    pair (Q, Q) or (B, 1, K, Q, Q): source column to target row inside a chunk. to_end (B, 1, K, Q)
    source to its chunk's end and from_start (B, 1, K, Q) chunk's start to target are None where all
    ones. boundary (K + 1, K + 1) or (B, 1, K + 1, K + 1): state at one chunk boundary to a later
    one. segments (B, T): number of resets so far, None without resets. The Triton kernels compare
    segments and need no factors: pair and boundary are None then.
    """

    chunk_len: int
    pair: Tensor | None = None
    boundary: Tensor | None = None
    to_end: Tensor | None = None
    from_start: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def create(
        cls,
        like: Tensor,
        *,
        chunk_len: int,
        reset_mask: Tensor | None = None,
        valid_mask: Tensor | None = None,
        backend: str = "torch",
    ) -> ScanMasks:
        """Masks (B, T) bool of the rows of like (B, T, ...), in its dtype and on its device."""
        if backend == "triton":
            counted = None if reset_mask is None else reset_mask.long().cumsum(1)
            return cls(chunk_len=chunk_len, segments=counted)
        batch, length = like.shape[:2]
        size = min(chunk_len, length)
        chunks = -(-length // size)

        def causal(n: int) -> Tensor:
            return torch.ones(n, n, dtype=torch.bool, device=like.device).tril_()

        pair, boundary = causal(size), causal(chunks + 1)
        to_end = from_start = segments = None
        if reset_mask is not None:
            segments = reset_mask.long().cumsum(1)
            # What pads the last chunk belongs to the last document.
            last = segments[:, -1:].expand(-1, chunks * size - length)
            by_chunk = torch.cat([segments, last], 1).view(-1, 1, chunks, size)  # (B, 1, K, Q)
            ends = F.pad(by_chunk[..., -1], (1, 0))  # (B, 1, K + 1), 0 before the row
            pair = pair & (by_chunk[..., :, None] == by_chunk[..., None, :])
            boundary = boundary & (ends[..., :, None] == ends[..., None, :])
            to_end = by_chunk == ends[..., 1:, None]
            from_start = (by_chunk == ends[..., :-1, None]).to(like.dtype)
        if valid_mask is not None:
            source = F.pad(valid_mask, (0, chunks * size - length)).view(batch, 1, chunks, size)
            pair = pair & source.unsqueeze(-2)
            to_end = source if to_end is None else to_end & source
        return cls(
            chunk_len=size,
            pair=pair.to(like.dtype),
            boundary=boundary.to(like.dtype),
            to_end=None if to_end is None else to_end.to(like.dtype),
            from_start=from_start,
            segments=segments,
        )


class _TurnPairs(torch.autograd.Function):
    """Rotation of the pairs (i, i + J) by angles that have a gradient of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        y = _turn(x, cos, sin)
        ctx.save_for_backward(y, cos, sin)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, cos, sin = ctx.saved_tensors
        grad, size = grads[0], cos.shape[-1]
        # d y / d angle is y turned by a quarter.
        torque = grad[..., size : 2 * size] * y[..., :size]
        torque.addcmul_(grad[..., :size], y[..., size : 2 * size], value=-1.0)
        dims = [i for i, n in enumerate(cos.shape) if n == 1 and y.shape[i] != 1]
        grad_angle = torque.sum(dims, keepdim=True) if dims else torque
        return _turn(grad, cos, -sin), grad_angle


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    first, second = x[..., :size], x[..., size : 2 * size]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=y[..., :size]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=y[..., size : 2 * size]).addcmul_(first, sin)
    y[..., 2 * size :] = x[..., 2 * size :]
    return y


def turn_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs (i, i + J) of the first 2 J coordinates of x (B, T, ..., N).

    angle: (B, T, J) radians. Both arguments get gradients. Returns x's shape.
    """
    for _ in range(x.dim() - angle.dim()):
        angle = angle.unsqueeze(-2)
    return apply_opaque(_TurnPairs, x, angle)


def running_angles(theta: Tensor, segments: Tensor | None, start: Tensor | None) -> Tensor:
    """Sum of theta (B, T, J) since the start of each step's document, in [0, 2 pi).

    start (B, J) is the angle before the first step; segments (B, T) counts resets. Summed in fp64:
    a sum of 4,096 increments in fp32 would be off by 1e-3 rad.
    """
    total = theta.double().cumsum(1)
    if start is not None:
        total = total + start.unsqueeze(1).double()
    if segments is not None:
        # What had accumulated before the latest reset is taken off again.
        is_start = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)) | (
            (segments > 0) & (torch.arange(segments.shape[1], device=theta.device) == 0)
        )
        steps = torch.arange(segments.shape[1], device=theta.device)
        latest = (steps * is_start).cummax(1).values.unsqueeze(-1).expand_as(total)
        before = (total - theta).gather(1, latest)
        total = total - before.masked_fill((segments == 0).unsqueeze(-1), 0.0)
    return total.remainder(2 * math.pi).to(theta.dtype)


def _next_step_weight(carry: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """carry (B, T, H) of the next valid step after each step, and of the first valid step (B, H).

    Zero where no valid step follows.
    """
    if valid_mask is None:
        return F.pad(carry[:, 1:], (0, 0, 0, 1)), carry[:, 0]
    length = carry.shape[1]
    steps = torch.arange(length, device=carry.device).masked_fill(~valid_mask, length)
    following = steps.flip(1).cummin(1).values.flip(1)  # (B, T), first valid step from here on
    index = F.pad(following, (0, 1), value=length)  # (B, T + 1)
    padded = F.pad(carry, (0, 0, 0, 1))  # step T weighs nothing
    found = padded.gather(1, index.unsqueeze(-1).expand(-1, -1, carry.shape[2]))
    return found[:, 1:], found[:, 0]


def mamba_scan(
    inputs: ScanInputs,
    *,
    chunk_len: int,
    reset_mask: Tensor | None = None,
    valid_mask: Tensor | None = None,
    state: MambaState | None = None,
    masks: ScanMasks | None = None,
    backend: str = "torch",
    in_bf16: bool = False,
    blocks: tuple[int, int] = (0, 0),
) -> tuple[Tensor, MambaState]:
    """Chunked scan over T >= 1 steps: y (B, T, H, R, P) and the state after the last step.

    reset_mask (B, T): a document starts here, nothing earlier is seen. valid_mask (B, T): False =
    padding, which contributes nothing and passes the state on. `masks` may be given to build them
    once for several scans. Computed in the dtype of x; gradients flow through states, too.
    backend "triton": by the kernels of `model.sigma_kernels`, in_bf16 with products in bf16, in
    tiles of `blocks` steps and state entries (0 = by device and shape).
    """
    if masks is None:
        given = {"reset_mask": reset_mask, "valid_mask": valid_mask, "backend": backend}
        masks = ScanMasks.create(inputs.x, chunk_len=chunk_len, **given)
    b, c, log_decay, theta = inputs.b, inputs.c, inputs.log_decay, inputs.theta
    gamma, carry = inputs.dt, None
    if inputs.trap is not None:
        gamma = inputs.trap * inputs.dt
        carry = inputs.dt - gamma
    if valid_mask is not None:
        padding = ~valid_mask.unsqueeze(-1)
        log_decay, gamma = log_decay.masked_fill(padding, 0.0), gamma.masked_fill(padding, 0.0)
        theta = None if theta is None else theta.masked_fill(padding, 0.0)
    angle = None
    if theta is not None:
        angle = running_angles(theta, masks.segments, None if state is None else state.angle)
        b, c = turn_pairs(b, angle), turn_pairs(c, angle)
    weight, start = gamma, None if state is None else state.h
    if carry is not None:
        following, first = _next_step_weight(carry, valid_mask)
        weight = gamma + following
        if state is not None:
            start = state.h + first[..., None, None] * _outer(inputs, state.prev_b, state.prev_x)
    if backend == "triton":
        if valid_mask is not None:
            weight = weight.masked_fill(~valid_mask.unsqueeze(-1), 0.0)
        values = (inputs.x, inputs.rank_in, b, c, log_decay, weight, gamma, inputs.skip, start)
        settings = {"chunk_len": chunk_len, "in_bf16": in_bf16, "blocks": blocks}
        y, h = _scan_by_kernels(values, masks, settings)
    else:
        log_weight = weight.clamp_min(_TINY).log()
        y, h = apply_opaque(
            *(ChunkedScan, inputs.x, inputs.rank_in, b, c, log_decay),
            *(log_weight, gamma, inputs.skip, start, masks),
        )
    prev_b, prev_x = b[:, -1], inputs.x[:, -1]
    if valid_mask is not None:
        prev_b, prev_x = _last_valid(inputs, b, valid_mask, masks.segments, state)
    last_angle = inputs.x.new_zeros(len(h), 0) if angle is None else angle[:, -1]
    return y, MambaState(h=h, prev_b=prev_b, prev_x=prev_x, angle=last_angle)


def _scan_by_kernels(
    values: tuple[Any, ...], masks: ScanMasks, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    from model.sigma_kernels import scan_chunks

    return scan_chunks(*values, segments=masks.segments, **settings)


def _outer(inputs: ScanInputs, b: Tensor, x: Tensor) -> Tensor:
    """Sum over ranks of B X^T: b (B, R, N), x (B, H, P) -> (B, H, N, P)."""
    return torch.einsum("brn,bhrp->bhnp", b, inputs.expand_rank(x))


def _last_valid(
    inputs: ScanInputs,
    b: Tensor,
    valid_mask: Tensor,
    segments: Tensor | None,
    state: MambaState | None,
) -> tuple[Tensor, Tensor]:
    """Rotated B (B, R, N) and x (B, H, P) of the last document's last valid step.

    Zero if it has none, or the given state's if no document started in between.
    """
    counted, is_new = valid_mask, None
    if segments is not None:
        counted = valid_mask & (segments == segments[:, -1:])
        is_new = segments[:, -1] > 0
    steps = torch.arange(valid_mask.shape[1], device=b.device)
    last = (steps * counted).amax(1)  # (B,)
    rows = torch.arange(len(last), device=b.device)
    found = counted.any(1)
    state = state or MambaState.zeros(inputs)
    results = []
    for values, before in ((b, state.prev_b), (inputs.x, state.prev_x)):
        shape = (-1, *[1] * (before.dim() - 1))
        if is_new is not None:
            before = before.masked_fill(is_new.view(shape), 0.0)
        results.append(torch.where(found.view(shape), values[rows, last], before))
    return results[0], results[1]


def mamba_step(
    inputs: ScanInputs,
    state: MambaState,
    *,
    reset_mask: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> tuple[Tensor, MambaState]:
    """One step (T = 1) of the recurrence: y (B, 1, H, R, P) and the next state.

    The state is read once and written once; no chunk is formed.
    """
    h, prev_b, prev_x, angle = state.h, state.prev_b, state.prev_x, state.angle
    if reset_mask is not None:
        keep = (~reset_mask[:, 0]).to(h.dtype)
        h, prev_b = h * keep.view(-1, 1, 1, 1), prev_b * keep.view(-1, 1, 1)
        prev_x, angle = prev_x * keep.view(-1, 1, 1), angle * keep.view(-1, 1)
    x, b, c = inputs.x[:, 0], inputs.b, inputs.c
    turned = angle
    if inputs.theta is not None:
        turned = (angle + inputs.theta[:, 0]).remainder(2 * math.pi)
        b, c = turn_pairs(torch.stack((b, c), dim=2), turned.unsqueeze(1)).unbind(2)
    b, c, dt = b[:, 0], c[:, 0], inputs.dt[:, 0]
    decay = inputs.log_decay[:, 0].exp()  # (B, H)
    ranked = inputs.expand_rank(x)  # (B, H, R, P)
    keys, added = b, dt[..., None, None] * ranked
    if inputs.trap is not None:
        gamma = inputs.trap[:, 0] * dt
        late = ((dt - gamma) * decay)[..., None, None] * inputs.expand_rank(prev_x)
        # Both terms of the trapezoid in one product: the large state is passed over once.
        keys = torch.cat((prev_b, b), dim=1)
        added = torch.cat((late, gamma[..., None, None] * ranked), dim=2)
    outer = torch.bmm(keys.mT, added.transpose(1, 2).flatten(2))  # (B, N, H P)
    new = torch.addcmul(outer.unflatten(2, x.shape[1:]).transpose(1, 2), h, decay[..., None, None])
    y = torch.bmm(c, new.transpose(1, 2).flatten(2)).unflatten(2, x.shape[1:])  # (B, R, H, P)
    y = y.transpose(1, 2) + inputs.skip[:, None, None] * ranked
    if valid_mask is not None:
        valid = valid_mask[:, 0]
        new = torch.where(valid.view(-1, 1, 1, 1), new, h)
        b = torch.where(valid.view(-1, 1, 1), b, prev_b)
        x = torch.where(valid.view(-1, 1, 1), x, prev_x)
        turned = torch.where(valid.view(-1, 1), turned, angle)
    return y.unsqueeze(1), MambaState(h=new, prev_b=b, prev_x=x, angle=turned)
