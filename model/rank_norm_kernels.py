"""The gated norm over ranks behind the scan, as one Triton kernel each way.

    out = sum_r gain_r o y_r / rms(y_r) o silu(z o gate_r)       rms over the P numbers of a head
with n = y / rms, s = silu(z gate), g the gradient of out:
    dn = g s gain      dy = (dn - n mean(dn n)) / rms      dgain = sum g s n
    dz = sum_r g n gain silu'(z gate) gate                 dgate = sum g n gain silu'(z gate) z
y has R times the numbers of out and is what this costs: read once forward, once backward. The plain
form (`_GatedRankNorm` in mamba.py, also the path without Triton) passes over it a dozen times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.opaque import apply_opaque
from model.sigma_kernel_src import load_tile

ROWS = 32  # tokens of a program; what it adds to the gradients of gain and gate is summed after


@triton.jit
def load_rank(ptr, head, r, p, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """A parameter's row (1, BLOCK_P) of one head and rank."""
    return tl.load(ptr + (head * RANK + r) * WIDTH + p, mask=p < WIDTH, other=0.0)[None, :]


@triton.jit
def rank_norm_kernel(
    y_ptr, z_ptr, gain_ptr, gate_ptr, out_ptr, num_rows, z_stride, eps,
    HAS_GATE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out (M, H, P) of one head and a tile of rows; y (M, H, R, P), z (M, H P) fp32."""
    head = tl.program_id(0) % HEADS
    row = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    p, inside = tl.arange(0, BLOCK_P), row < num_rows
    z = load_tile(z_ptr + head * WIDTH, row * z_stride, p, inside, p < WIDTH).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    for r in range(RANK):
        y = load_tile(y_ptr, ((row * HEADS + head) * RANK + r) * WIDTH, p, inside, p < WIDTH)
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / WIDTH + eps)[:, None]
        pre = z
        if HAS_GATE:
            pre = z * load_rank(gate_ptr, head, r, p, RANK, WIDTH)
        sums += y * inverse * load_rank(gain_ptr, head, r, p, RANK, WIDTH) * pre * tl.sigmoid(pre)
    at = ((row * HEADS + head) * WIDTH)[:, None] + p[None, :]
    tl.store(out_ptr + at, sums, mask=inside[:, None] & (p < WIDTH)[None, :])


@triton.jit
def rank_norm_backward_kernel(
    grad_ptr, y_ptr, z_ptr, gain_ptr, gate_ptr, grad_y_ptr, grad_z_ptr, grad_gain_ptr,
    grad_gate_ptr, num_rows, z_stride, eps,
    HAS_GATE: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_y, grad_z (M, H, P) of a tile; its parts of grad_gain, grad_gate (tiles, H, R, P)."""
    head, tile = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    row, p = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    inside, columns = row < num_rows, p < WIDTH
    z = load_tile(z_ptr + head * WIDTH, row * z_stride, p, inside, columns).to(tl.float32)
    at = (row * HEADS + head) * WIDTH
    g = load_tile(grad_ptr, at, p, inside, columns).to(tl.float32)
    mask = inside[:, None] & columns[None, :]
    grad_z = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    for r in range(RANK):
        rows = ((row * HEADS + head) * RANK + r) * WIDTH
        y = load_tile(y_ptr, rows, p, inside, columns)
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / WIDTH + eps)[:, None]
        normed = y * inverse
        gain = load_rank(gain_ptr, head, r, p, RANK, WIDTH)
        pre = z
        if HAS_GATE:
            gate = load_rank(gate_ptr, head, r, p, RANK, WIDTH)
            pre = z * gate
        share = tl.sigmoid(pre)
        of_norm = g * pre * share
        of_pre = g * normed * gain * share * (1.0 + pre * (1.0 - share))
        part = ((tile * HEADS + head) * RANK + r) * WIDTH + p
        tl.store(grad_gain_ptr + part, tl.sum(of_norm * normed, axis=0), mask=columns)
        of_norm *= gain
        along = tl.sum(of_norm * normed, axis=1)[:, None] / WIDTH
        grad_y = (of_norm - normed * along) * inverse
        tl.store(grad_y_ptr + rows[:, None] + p[None, :], grad_y, mask=mask)
        if HAS_GATE:
            tl.store(grad_gate_ptr + part, tl.sum(of_pre * z, axis=0), mask=columns)
            of_pre *= gate
        grad_z += of_pre
    tl.store(grad_z_ptr + at[:, None] + p[None, :], grad_z, mask=mask)


def rank_norm_constants(heads: int, rank: int, width: int, *, has_gate: bool) -> dict[str, Any]:
    """Constants that both kernels share."""
    return {
        "HAS_GATE": has_gate,
        "HEADS": heads,
        "RANK": rank,
        "WIDTH": width,
        "BLOCK_M": ROWS,
        "BLOCK_P": 1 << (width - 1).bit_length(),
    }


class _RankNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, gain: Tensor, gate: Tensor | None, eps: float
    ) -> Tensor:
        heads, rank, width = gain.shape
        rows = y.numel() // gain.numel()
        y, gain = y.contiguous(), gain.contiguous()
        stride = z.stride(-3) if z.dim() == 4 else heads * width
        regular = z.stride()[-2:] == (width, 1) and z.stride(0) == z.shape[1] * stride
        if not regular:
            z, stride = z.contiguous(), heads * width
        gates = gain if gate is None else gate.contiguous()
        out = torch.empty(z.shape, dtype=torch.float32, device=y.device)
        constants = rank_norm_constants(heads, rank, width, has_gate=gate is not None)
        tiles = -(-rows // ROWS)
        arguments = (y, z, gain, gates, out, rows, stride, eps)
        rank_norm_kernel[(tiles * heads,)](*arguments, **constants)
        ctx.save_for_backward(y, z, gain, gates)
        ctx.sizes = (tiles, rows, stride, eps, constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gain, gates = ctx.saved_tensors
        tiles, rows, stride, eps, constants = ctx.sizes
        empty = {"dtype": torch.float32, "device": y.device}
        grad_y, grad_z = torch.empty(y.shape, **empty), torch.empty(z.shape, **empty)
        of_gain, of_gate = torch.empty(2, tiles, *gain.shape, **empty).unbind()
        rank_norm_backward_kernel[(tiles * gain.shape[0],)](
            *(grads[0].contiguous(), y, z, gain, gates, grad_y, grad_z, of_gain, of_gate),
            *(rows, stride, eps),
            **constants,
        )
        grad_gate = of_gate.sum(0) if constants["HAS_GATE"] else None
        return grad_y, grad_z.to(z.dtype), of_gain.sum(0), grad_gate, None


def gated_rank_norm(
    y: Tensor, z: Tensor, gain: Tensor, gate: Tensor | None, *, eps: float
) -> Tensor:
    """y (B, T, H, R, P) fp32, z (B, T, H, P), gain and gate (H, R, P) -> (B, T, H, P) fp32."""
    return apply_opaque(_RankNorm, y, z, gain, gate, eps)
